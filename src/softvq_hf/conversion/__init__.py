"""Official checkpoints to the models of this library; one file per system."""
