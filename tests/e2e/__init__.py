"""Real swtpms, real sockets, real processes."""
