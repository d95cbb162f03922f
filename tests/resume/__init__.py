"""kill -9 of a training, over and over: it goes on, and ends with the weights of one that nobody disturbed."""
