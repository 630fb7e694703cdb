"""What is asked for: cells, settings, plans, shards. Loads neither torch nor diffusers."""
