"""Hugging Face: which architectures can be upcycled, their registered classes, saving, loading and reward scores."""

from transformers.pytorch_utils import Conv1D

from ..nn.dense import register_transposed_linear

register_transposed_linear(Conv1D)  # GPT-2's linear map
