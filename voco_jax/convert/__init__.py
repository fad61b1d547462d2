"""Weights in and out: PyTorch and Hugging Face checkpoints to runs of ours and back (`voco convert`)."""
