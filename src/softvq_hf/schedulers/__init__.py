"""How noise becomes latents: the schedulers that diffusers lacks."""
