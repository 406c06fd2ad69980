"""What unlearning is worth: compared with retrained models and with peers."""
