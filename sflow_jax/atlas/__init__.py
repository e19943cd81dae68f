"""The attention atlas: where points and words of a picture attend in every layer."""
