"""The engine over HTTP in OpenAI's shape: a thin app over Starlette, served by uvicorn."""
