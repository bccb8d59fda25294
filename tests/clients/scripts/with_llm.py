# needs: llm==0.36
import os
import subprocess
import sys
import tempfile
from pathlib import Path

with tempfile.TemporaryDirectory() as directory:
    entry = f"- {{model_id: tutor, model_name: tutor, api_base: '{os.environ['BASE_URL']}', api_key_name: none}}\n"
    Path(directory, "extra-openai-models.yaml").write_text(entry.replace(", api_key_name: none", ""))
    environment = os.environ | {"LLM_USER_PATH": directory, "OPENAI_API_KEY": "any"}

    def ask(*arguments: str) -> str:
        command = [sys.executable, "-m", "llm", "-m", "tutor", "-o", "temperature", "0", "-o", "max_tokens", "16"]
        done = subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True, check=True)
        return done.stdout

    whole = ask("--no-stream", "What is a KV cache?")
    assert whole.strip() and ask("What is a KV cache?") == whole
    assert ask("-c", "And a block?").strip()
