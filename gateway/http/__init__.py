"""The HTTP edge: OpenAI's API on Starlette. Parses and refuses here, so that only valid requests go inwards."""
