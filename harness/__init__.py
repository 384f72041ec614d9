"""Deep attestation for KVM: a tenant's vTPM tied to the host's hardware TPM.

Where things live:

* this package: the protocol and what both sides share (errors, values, attest, merkle, protocol, messages, ...)
* ``harness.sim``: simulated hardware (hardware TPM, chip latency, measured boot, guests)
* ``harness.provider``: the provider's side, which proves (host agent, provider verifier, registrar, vTPM CA)
* ``harness.tenant``: the tenant's side, which appraises (verifier, registrar, guest agent, policy)
* ``harness.attacks``: hostile providers and images that the lab plays against itself
* ``harness.cli``, ``harness.lab``, ``harness.serve``: composition roots that put the parts together
"""

__version__ = "0.1.0"
