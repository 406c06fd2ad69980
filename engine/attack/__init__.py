"""U-LiRA: attacks on an unlearning procedure by an ensemble of models."""
