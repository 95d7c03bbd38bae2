"""The frozen backbone, trainable kinds and heads."""
