"""U-LiRA: attacks by an ensemble of models."""
