"""No process, no socket, no real time."""
