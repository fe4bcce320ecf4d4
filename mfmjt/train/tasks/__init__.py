"""What is trained: the codec, the encoders, the network, and the classifier that judges."""
