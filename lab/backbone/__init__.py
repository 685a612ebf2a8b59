"""Studies from a pretrained backbone: many small reward models trained side by side, one entry a seed."""
