"""An OpenAI-compatible server whose pictures are compressed once: `voco serve`."""
