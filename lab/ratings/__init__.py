"""Real human ratings as a regime: texts that many people rated, on a pretrained BERT whose lower layers are frozen."""
