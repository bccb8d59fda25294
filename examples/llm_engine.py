"""An engine from the command line, where every field of its configuration is a flag, also under other engines' names.

    python examples/llm_engine.py --model /path/to/model --devices cpu
    python examples/llm_engine.py --model /path/to/model --devices cuda:0,cuda:1 --pipeline-parallel-size 2

从命令行构造引擎：配置的每个字段都是一个选项，其他引擎的叫法也可以用。
"""

import typer

from mini_infer import EngineConfig, LLMEngine, SamplingParams
from mini_infer.cli.flags import engine_flags

PROMPTS = ("What is a KV cache?", "Once upon a time", "什么是分页注意力？")

app = typer.Typer(help="Demo on using the LLMEngine class directly", add_completion=False)


@app.command()
@engine_flags
def main(config: EngineConfig) -> None:
    with LLMEngine(config) as engine:
        for number, prompt in enumerate(PROMPTS):
            engine.add_request(prompt, SamplingParams(temperature=0.0, max_tokens=20), request_id=str(number))
        while not engine.is_finished():
            finished, _ = engine.step()
            for request_id, _ in finished:
                output = engine.get_output(request_id)
                print(f"{request_id}: {output.prompt!r} -> {output.text!r}")


if __name__ == "__main__":
    app()
