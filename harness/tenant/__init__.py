"""The tenant's side: appraises. Verifier, registrar, guest agent, appraisal."""
