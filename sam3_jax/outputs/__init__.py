"""Model outputs: instances, masks, run-length encoding, COCO JSON, overlays."""
