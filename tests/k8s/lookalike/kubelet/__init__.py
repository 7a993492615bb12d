"""What a node does with a pod."""
