"""The provider's side: proves. Host agent, provider verifier, provider registrar, vTPM CA."""
