"""From cells to images: networks, schedulers, the loop, batches, and what they cost."""
