"""What is done around a step: taking selections, counting, loading a round's inputs."""
