# needs: dspy==3.4.1
import os

import dspy

where = {"api_base": os.environ["BASE_URL"], "api_key": "any", "cache": False, "num_retries": 0, "max_tokens": 16}
text = dspy.LM("openai/tutor", **where, temperature=0)("What is a KV cache?")
assert text and text[0]
assert len(dspy.LM("openai/tutor", **where, temperature=1.0)("Hello", n=2)) == 2
assert dspy.LM("openai/tutor", **where, temperature=0, model_type="responses")("What is a KV cache?")
