"""Other people's models by name: references, torchvision's operations and inputs."""
