-- generate.lua: continue a text.
local lc = require "lolcats"
local files = require "lolcats.files"

local args = lc.args {
    "Continues a prompt and streams the result to standard output.",
    { "prompt", lc.required, "the text to continue; - reads standard input", positional = true },
    { "model", "smollm2", "folder, GGUF file, Hub id in the local cache, saved student, or smollm2" },
    { "base", "", "the model that a saved student or a checkpoint was made from, where it has moved" },
    { "chat", false, "treat the prompt as a user's message: the model's chat template is put around it" },
    { "system", "", "with --chat: the system message" },
    { "max_new", 200, "tokens at most", min = 1 },
    { "temperature", 0, "0 takes the likeliest token; above 0 samples", min = 0 },
    { "top_k", 0, "sample from the k likeliest only; 0: off", min = 0 },
    { "top_p", 1, "sample from the likeliest that make up this probability", min = 0, max = 1 },
    { "min_p", 0, "leave out tokens below this share of the likeliest", min = 0, max = 1 },
    { "repetition", 1, "penalty on tokens already in the text; 1: off", min = 0 },
    { "seed", 0, "of the sampling" },
    { "stop", {}, "texts that end the generation" },
    { "dtype", "f32", "of the weights", choices = { "f32", "bf16", "f16", "f64" } },
    { "device", "cpu", "where to compute" },
    { "state_dtype", "", "of a linearized model's state on a GPU: f32, or what dtype says, which halves what a token reads of it" },
    { "json", false, "one JSON object instead of streamed text" },
}

local model = lc.load(args.model, { base = args.base ~= "" and args.base or nil, dtype = args.dtype, device = args.device })
if not model.tokenizer then lc.fail("%s has no tokenizer (tokenizer.json)", args.model) end
local prompt = args.prompt == "-" and io.read "*a" or args.prompt
local opts = { max_new = args.max_new, temperature = args.temperature, top_k = args.top_k, top_p = args.top_p,
               min_p = args.min_p, repetition = args.repetition, seed = args.seed, stop = args.stop,
               state_dtype = args.state_dtype ~= "" and args.state_dtype or nil }
if not args.json then
    opts.stream = function(piece)
        io.write(piece)
        io.flush()
    end
end
local text, ids, info
if args.chat then
    text, ids, info = lc.chat(model, { system = args.system ~= "" and args.system or nil, state_dtype = opts.state_dtype }):say(prompt, opts)
else
    if not args.json then io.write(prompt) end
    text, ids, info = model:generate(prompt, opts)
end
local rate = #ids / math.max(info.seconds, 1e-9)
if args.json then
    print(files.to_json { model = args.model, prompt = prompt, text = text, ids = #ids > 0 and ids or files.array {},
                          reason = info.reason, prompt_tokens = info.prompt_tokens, new_tokens = #ids, prompt_seconds = info.prompt_seconds,
                          seconds = info.seconds, tok_s = rate })
else
    io.write "\n"
    io.flush()
    io.stderr:write(("%d prompt tokens in %.2f s, %d new at %.1f tokens/s (%s)\n"):format(info.prompt_tokens,
        info.prompt_seconds, #ids, rate, info.reason))
end
