"""Images against real ones: features, references, metrics and their standard errors."""
