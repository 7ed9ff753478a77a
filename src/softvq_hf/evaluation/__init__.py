"""What `softvq-hf evaluate` and `softvq-hf inspect` run: whole evaluations by a stated protocol, and pictures."""
