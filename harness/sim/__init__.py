"""Simulated hardware: a slow hardware TPM, measured boot and guests; usable under any TPM client."""
