"""What OpenAPI says of the routes: bodies, answers, and examples that work as they stand."""

from typing import Any

JOB_EXAMPLE: dict[str, Any] = {
    "id": "0123456789abcdef0123456789abcdef",
    "state": "done",
    "progress": 1.0,
    "name": "photo",
    "pictures": 1,
    "from_cache": [False],
    "shared_with": 0,
    "seconds": {"images": 0.02, "siglip2": 1.2, "dinov3": 10.3, "adapter": 0.3},
    "links": {
        "self": "/v1/jobs/0123456789abcdef0123456789abcdef",
        "events": "/v1/events/0123456789abcdef0123456789abcdef",
        "lora": "/v1/jobs/0123456789abcdef0123456789abcdef/lora",
        "plot": "/v1/jobs/0123456789abcdef0123456789abcdef/plot",
    },
    "lora": {"rank": 4, "tensors": 476, "bytes": 20_000_000},
}
STATES = ["reading", "waiting", "running", "done", "failed", "cancelled", "lost"]
JOB_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["id", "state", "progress", "name", "pictures", "from_cache", "shared_with", "seconds", "links"],
    "properties": {
        "id": {"type": "string"},
        "state": {"type": "string", "enum": STATES},
        "progress": {"type": "number", "minimum": 0, "maximum": 1},
        "name": {"type": "string"},
        "pictures": {"type": "integer"},
        "from_cache": {"type": "array", "items": {"type": "boolean"}},
        "shared_with": {"type": "integer", "description": "other requests in its pass over the weights"},
        "seconds": {"type": "object", "additionalProperties": {"type": "number"}},
        "links": {"type": "object", "additionalProperties": {"type": "string"}},
        "lora": {"type": "object", "description": "once it is done: its rank, tensors and bytes"},
        "problem": {"$ref": "#/components/schemas/Problem"},
    },
}
PROBLEM_SCHEMA: dict[str, Any] = {
    "type": "object",
    "description": "RFC 9457",
    "required": ["type", "title", "status", "detail"],
    "properties": {
        "type": {"type": "string"},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string", "description": "what is wrong, a colon, and what mends it"},
    },
}
SCHEMAS = {"Job": JOB_SCHEMA, "Problem": PROBLEM_SCHEMA}
FORM: dict[str, Any] = {
    "type": "object",
    "required": ["pictures"],
    "properties": {
        "pictures": {
            "type": "array",
            "minItems": 1,
            "items": {"type": "string", "format": "binary"},
            "description": "one part for each picture, with a file name",
        },
        "weights": {
            "type": "array",
            "items": {"type": "number"},
            "description": "one for each picture, in their order, taken as they are; none: 1/N each",
        },
        "strength": {"type": "number", "default": 1, "description": "multiplies the LoRA's effect"},
        "rank": {"type": "integer", "minimum": 1, "description": "at most; none: four for each picture"},
        "dtype": {"type": "string", "enum": ["bf16", "fp16", "fp32"], "default": "bf16"},
        "key_format": {"type": "string", "enum": ["comfyui", "diffsynth"], "default": "comfyui"},
        "name": {"type": "string", "default": "lora", "description": "the file's, without suffix"},
    },
}
FORM_EXAMPLES: dict[str, Any] = {
    "one": {"summary": "one picture", "value": {"pictures": ["photo.jpg"], "name": "photo"}},
    "two": {
        "summary": "two pictures, the second of which counts less, at rank 4",
        "value": {
            "pictures": ["photo.jpg", "other.jpg"],
            "weights": [0.7, 0.3],
            "rank": 4,
            "strength": 0.9,
            "dtype": "fp16",
            "key_format": "diffsynth",
        },
    },
}
POST_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": FORM,
                "examples": FORM_EXAMPLES,
                "encoding": {"weights": {"style": "form", "explode": True}},
            }
        },
    },
    "parameters": [
        {
            "name": "Prefer",
            "in": "header",
            "required": False,
            "schema": {"type": "string"},
            "description": "respond-async: answer 202 at once, with the job's address",
            "examples": {"wait": {"value": "wait"}, "async": {"value": "respond-async"}},
        }
    ],
}
BINARY = {"schema": {"type": "string", "format": "binary"}}


def answers(**content: Any) -> dict[int | str, dict[str, Any]]:
    """The answers of a route: ``ok`` (or ``accepted``) by media type, and problems."""
    found: dict[int | str, dict[str, Any]] = {
        "default": {
            "description": "a problem document",
            "content": {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}},
        }
    }
    for name, (status, words) in {"ok": (200, "as asked"), "accepted": (202, "the job waits")}.items():
        if name in content:
            found[status] = {"description": words, "content": content[name]}
    return found


JOB_CONTENT = {"application/json": {"schema": {"$ref": "#/components/schemas/Job"}, "example": JOB_EXAMPLE}}
