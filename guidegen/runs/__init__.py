"""What `guidegen.runs.directory` is made of: files, locks, manifests, what may stand in them, and the text in images."""
