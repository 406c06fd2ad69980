"""What the engine needs of the machine it runs on."""
