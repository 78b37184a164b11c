"""Other people's models: by reference, torchvision's operators and inputs, random weights."""
