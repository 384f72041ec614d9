"""Long runs: `make soak`, and their short forms in CI."""
