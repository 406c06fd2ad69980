"""Quality of unlearning, compared with retrained models and with other libraries."""
