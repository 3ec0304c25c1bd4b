"""How the shipped model and its evaluation features are trained."""
