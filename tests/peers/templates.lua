-- templates.lua: the chat templates that tests/peers/templates.py wrote, against what jinja2 made of them. Those that
-- it refuses, and those that are refused here by name, are counted only.
--   lolcats tests/peers/templates.lua FILE
local files = require "lolcats.files"
local template = require "lolcats.chat_template"
local cases = files.read_json(arg and arg[1] or "")
local variables = files.read((arg[0]:match "^(.*/)" or "") .. "templates.json")
local passed, failed, refused, unsupported = 0, 0, 0, 0

for _, case in ipairs(cases) do
    local ok, text = pcall(function() return template.compile(case.template):render(template.from_json(variables)) end)
    if case.text == files.null then
        refused = refused + 1
    elseif not ok and tostring(text):find("not supported", 1, true) then
        unsupported = unsupported + 1
    elseif ok and text == case.text then
        passed = passed + 1
    else
        failed = failed + 1
        if failed <= 20 then print(("FAIL  %q\n      got  %q\n      want %q"):format(case.template, tostring(text),
                                                                                     case.text)) end
    end
end
print(("%d passed, %d failed, %d not compared, %d not supported"):format(passed, failed, refused, unsupported))
if failed > 0 or passed == 0 then os.exit(1) end
