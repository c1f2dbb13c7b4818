"""Training in several processes: which of them share a model, and how its parameters are spread over them."""
