"""What `register` goes through, one file a stage: preprocess, affine, dense, refine."""
