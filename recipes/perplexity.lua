-- perplexity.lua: how well a model predicts a text.
local lc = require "lolcats"
local files = require "lolcats.files"
local eval = require "lolcats.eval"

local args = lc.args {
    "Perplexity of a text file under a model: exp of the mean next-token loss over all counted tokens.",
    { "model", "smollm2", "folder, GGUF file, Hub id in the local cache, saved student, or smollm2" },
    { "base", "", "the model that a saved student or a checkpoint was made from, where it has moved" },
    { "text", lc.required, "text file (UTF-8); - reads standard input" },
    { "seq", 1024, "tokens a window", min = 2 },
    { "stride", 0, "tokens from one window to the next; 0: windows side by side. A smaller one counts each token once, " ..
      "with more context", min = 0 },
    { "limit", 0, "at most this many windows; 0: all", min = 0 },
    { "bos", false, "put the model's BOS token before every window" },
    { "dtype", "f32", "of the weights", choices = { "f32", "bf16", "f16", "f64" } },
    { "device", "cpu", "where to compute" },
    { "window_only", false, "a linearized model without its linear part: is it used at all?" },
    { "teacher", false, "a linearized model with its teacher's softmax attention" },
    { "json", false, "one JSON object instead of text" },
}

local model = lc.load(args.model, { base = args.base ~= "" and args.base or nil, dtype = args.dtype, device = args.device })
if not model.tokenizer then lc.fail("%s has no tokenizer (tokenizer.json)", args.model) end
if (args.window_only or args.teacher) and not model.is_student then
    lc.fail("--window-only and --teacher are for linearized models; %s is not one", args.model)
end
local text
if args.text == "-" then text = io.read "*a" else text = files.read(args.text) end
local ids = model.tokenizer:encode(text, { special = false, parse = false })
if #ids < 2 then lc.fail("%s has %d tokens; perplexity needs at least 2", args.text, #ids) end

local tty = require("lolcats.program").is_terminal and require("lolcats.program").is_terminal(2)
local t0 = lc.now()
local function run()
    return eval.perplexity(model, ids, {
        seq = args.seq, stride = args.stride > 0 and args.stride or nil, limit = args.limit > 0 and args.limit or nil,
        bos = args.bos and model.config.bos_token_id or nil, forward = { teacher = args.teacher },
        progress = tty and function(i, n)
            io.stderr:write(("\r%d / %d windows "):format(i, n))
            if i == n then io.stderr:write "\r\27[K" end
        end,
    })
end
local r
if args.window_only then r = model:window_only(run) else r = run() end
local seconds = lc.now() - t0

if args.json then
    print(files.to_json {
        model = args.model, text = args.text, ppl = r.ppl, loss = r.loss, tokens = r.tokens, windows = r.windows,
        ppl_window_mean = r.ppl_window_mean, window_losses = r.losses, seq = args.seq,
        stride = args.stride > 0 and args.stride or args.seq, seconds = seconds, tok_s = r.tokens / seconds,
    })
else
    print(("perplexity %.4f   loss %.5f over %d tokens in %d windows of %d (mean of the windows' perplexities %.4f), " ..
        "%.0f tokens/s"):format(r.ppl, r.loss, r.tokens, r.windows, args.seq, r.ppl_window_mean, r.tokens / seconds))
end
