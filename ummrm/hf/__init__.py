"""Hugging Face: which architectures can be upcycled, their registered classes, saving, loading and reward scores."""
