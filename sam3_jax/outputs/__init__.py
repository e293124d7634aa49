"""What comes out of the model: instances, masks, run lengths, COCO JSON, drawings."""
