"""What the Metal emulator and the CUDA shim share, and the emulator's run-time library."""
