"""Videos of the server: upload, prompts on frames, tracking with streamed results, export."""
