"""Faces in photos: where they are, and how they are brought into the frame of the faces a model was trained on."""
