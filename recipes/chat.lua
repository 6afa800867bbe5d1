-- chat.lua: talk to a model.
local lc = require "lolcats"
local program = require "lolcats.program"

local args = lc.args {
    "A conversation with a model through its own chat template. A linearized model carries a state of constant size " ..
    "from turn to turn, so no turn reads the past again. Commands: /reset starts over, /system TEXT sets the system " ..
    "message, /exit leaves.",
    { "model", "smollm2", "folder, GGUF file, Hub id in the local cache, saved student, or smollm2" },
    { "base", "", "the model that a saved student or a checkpoint was made from, where it has moved" },
    { "system", "", "the system message" },
    { "max_new", 400, "tokens a reply at most", min = 1 },
    { "temperature", 0.6, "0 takes the likeliest token", min = 0 },
    { "top_k", 0, "sample from the k likeliest only; 0: off", min = 0 },
    { "top_p", 0.95, "sample from the likeliest that make up this probability", min = 0, max = 1 },
    { "min_p", 0, "leave out tokens below this share of the likeliest", min = 0, max = 1 },
    { "repetition", 1, "penalty on tokens already in the text; 1: off", min = 0 },
    { "seed", -1, "of the sampling; -1: a new one each time" },
    { "teacher", false, "a linearized model with its teacher's softmax attention" },
    { "stats", false, "after each reply: tokens and rate on standard error" },
    { "dtype", "f32", "of the weights", choices = { "f32", "bf16", "f16", "f64" } },
    { "device", "cpu", "where to compute" },
    { "state_dtype", "", "of a linearized model's state on a GPU: f32, or what dtype says, which halves what a token reads of it" },
}

local model = lc.load(args.model, { base = args.base ~= "" and args.base or nil, dtype = args.dtype, device = args.device })
local function system_message() return args.system ~= "" and args.system or nil end
local chat = lc.chat(model, { system = system_message(), teacher = args.teacher or nil,
                            state_dtype = args.state_dtype ~= "" and args.state_dtype or nil })
local interactive = program.is_terminal and program.is_terminal(0)
local turn = 0

local function how()
    turn = turn + 1
    return { max_new = args.max_new, temperature = args.temperature, top_k = args.top_k, top_p = args.top_p,
             min_p = args.min_p, repetition = args.repetition, seed = args.seed >= 0 and args.seed + turn or os.time() + turn,
             stream = function(piece) io.write(piece); io.flush() end }
end

local function say(line)
    local ok, reply, ids, info = pcall(chat.say, chat, line, how())
    io.write "\n"
    io.flush()
    if not ok then
        if type(reply) == "table" and reply.code == "EINTR" then -- Ctrl-C ends the reply, not the conversation
            lc.clear_interrupt()
            io.stderr:write "(interrupted)\n"
            return
        end
        error(reply, 0)
    end
    if args.stats then
        io.stderr:write(("%d tokens read in %.2f s, %d new at %.1f tokens/s; %d in all\n"):format(info.read_tokens,
            info.prompt_seconds, #ids, #ids / math.max(info.seconds, 1e-9), #chat.session.ids))
    end
end

if interactive then io.stderr:write(tostring(model), "\n/reset, /system TEXT, /exit\n") end
while true do
    if interactive then io.stderr:write "> " end
    local line = io.read "*l"
    if not line then break end
    local command, rest = line:match "^%s*/(%a+)%s*(.-)%s*$"
    if command == "exit" or command == "quit" then
        break
    elseif command == "reset" then
        chat:reset()
        if interactive then io.stderr:write "(a new conversation)\n" end
    elseif command == "system" then
        chat.opts.system = rest ~= "" and rest or nil
        chat:reset()
        if interactive then io.stderr:write "(a new conversation)\n" end
    elseif command then
        io.stderr:write("there is no /" .. command .. "; /reset, /system TEXT, /exit\n")
    elseif line:match "%S" then
        say(line)
    end
end
