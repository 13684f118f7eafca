-- The shared counters of one environment: everything that has to happen at once, and nothing else. One script in four
-- parts: cells, requests, limits, sessions.
--
-- What a request is told (waits, headers, what is short) the node works out from the states that are returned.
-- All numbers are whole and below 2^53, where doubles are exact: a bucket's level is kept as whole tokens and a
-- fraction in 1/period tokens, and no product of two large numbers is ever formed.
--
-- KEYS: the cells; sessions and sums; this session's reservations. One slot: they share a hash tag, as do the keys of
-- other sessions, which are made of this one's.
-- ARGV: command, now (0: the server's clock), the time after which nothing is to be done (0: never), session, bounds of
-- calendar periods, the command's own arguments.

local cells_key, meta_key, own_key = KEYS[1], KEYS[2], KEYS[3]
local floor, max, min = math.floor, math.max, math.min

-- What a command answers with first.
local DENIED, ADMITTED, FULL, BOUNDS, UNKNOWN, LATE, DONE = 0, 1, 2, 3, 4, 5, 6
local TOTAL, PROMPT, COMPLETION, REQUESTS = 1, 2, 3, 4
local MAX_AMOUNT = 2 ^ 40
local SMALLEST_CLAMP = 16
-- A session that is not renewed for so long is over: what it holds is charged.
local SESSION_MS = 15000
-- Where nobody was heard of for so long, it was the server that was away.
local SILENCE_MS = 5000
-- Arguments of one call: more than 8,000 there cannot be. Even, since fields are written with their values.
local MOST_AT_ONCE = 1000
-- Reservations charged in one go, or little more.
local MOST_EXPIRED = 200
-- Nodes that come back to a server that has lost its data have so much time to bring what they know.
local REGAIN_MS = 1000
-- The field of a session's reservations that has what it leases: no request's.
local LEASE = 'lease'
-- For so long it is remembered what a session was charged for.
local FORGET_MS = 86400000
-- That a cell is in use is noted so often, and looked at as often.
local SEEN_MS = 3600000

local at = 0
local function text() at = at + 1 return ARGV[at] end
local function int() at = at + 1 return tonumber(ARGV[at]) end
local function amounts() return { int(), int(), int(), int() } end
local function texts(n) local all = {} for i = 1, n do all[i] = text() end return all end

local command, now, deadline, session = text(), int(), int(), text()
if now == 0 then
  local time = redis.call('TIME')
  now = time[1] * 1000 + floor(time[2] / 1000)
end
if deadline > 0 and now > deadline then return { LATE, now } end
local bounds = {}
for _ = 1, int() do
  local class, start = text(), int()
  bounds[class] = { start, int() }
end

-- Where a session's reservations are, and those that it was charged for.
local own_prefix = own_key:sub(1, #own_key - #session)
local function reserved_key(of) return own_prefix .. of end
local function charged_key(of) return own_prefix .. 'charged:' .. of end

local function is_known()
  return (tonumber(redis.call('HGET', meta_key, 's:' .. session)) or 0) > 0
end

-- A cell that nobody has any more is forgotten when its period is over twice, and a day has gone by.
local function kept_ms(cell) return 2 * (cell.per or cell.stop - cell.start) + FORGET_MS end

-- Cells: read once, written once.
local cells, dirty = {}, {}

local function load(names)
  local missing = {}
  for _, name in ipairs(names) do
    if cells[name] == nil then missing[#missing + 1] = name cells[name] = false end
  end
  if #missing == 0 then return end
  for from = 1, #missing, MOST_AT_ONCE do
    local part = { unpack(missing, from, min(from + MOST_AT_ONCE - 1, #missing)) }
    for i, packed in ipairs(redis.call('HMGET', cells_key, unpack(part))) do
      if packed then cells[part[i]] = cmsgpack.unpack(packed) end
    end
  end
end

local function save()
  local fields = {}
  for name in pairs(dirty) do
    fields[#fields + 1] = name
    fields[#fields + 1] = cmsgpack.pack(cells[name])
  end
  for from = 1, #fields, MOST_AT_ONCE do
    redis.call('HSET', cells_key, unpack(fields, from, min(from + MOST_AT_ONCE - 1, #fields)))
  end
end

-- Never fuller than the room that nobody holds.
local function cap(cell)
  local top = cell.burst - cell.held
  if cell.whole >= top then cell.whole, cell.fraction = top, 0 end
end

-- Adds limit * elapsed / per tokens, exactly.
local function refill(cell)
  local elapsed = now - cell.at
  cell.at = now
  local missing = cell.burst - cell.held - cell.whole
  if missing <= 0 or elapsed <= 0 then return end
  local per, limit = cell.per, cell.limit
  local periods = floor(elapsed / per)
  -- A product that is not exact is larger than anything that can be missing.
  if periods * limit >= missing then
    cell.whole, cell.fraction = cell.whole + missing, 0
    return
  end
  local rest = elapsed - periods * per
  local each = floor(limit / per)
  local odd = limit - each * per
  -- odd * rest / per by long multiplication: both are below 2^35, a limb has 12 bits.
  local quotient, remainder = 0, 0
  for _, limb in ipairs({ floor(rest / 16777216), floor(rest / 4096) % 4096, rest % 4096 }) do
    local part = remainder * 4096 + odd * limb
    local whole = floor(part / per)
    quotient = quotient * 4096 + whole
    remainder = part - whole * per
  end
  cell.whole = cell.whole + periods * limit + each * rest + quotient
  cell.fraction = cell.fraction + remainder
  if cell.fraction >= per then
    cell.whole, cell.fraction = cell.whole + 1, cell.fraction - per
  end
  cap(cell)
end

-- Turns the period if its end has come; a clock that was stepped back grants nothing. Of a quota that is none of this
-- node's the period is left as it is: whoever has it turns it.
local function roll(cell)
  if now >= cell.start and now < cell.stop then return true end
  local period = bounds[cell.class]
  if not period then return true end
  if now < period[1] or now >= period[2] then return false end
  if now >= cell.stop then
    cell.turn, cell.used, cell.held = max(cell.turn + 1, period[1]), 0, 0
  end
  cell.start, cell.stop = period[1], period[2]
  return true
end

-- Brings cells up to now; who only looks need not save that. False: the node has to say anew where calendar periods
-- begin and end.
local function advance(names)
  for _, name in ipairs(names) do
    local cell = cells[name]
    if cell then
      if cell.class then
        if not roll(cell) then return false end
      else
        refill(cell)
      end
    end
  end
  return true
end

local function fits(cell, amount)
  local needed = max(amount, 1)
  if cell.class then return amount <= cell.limit and cell.used + cell.held + needed <= cell.limit end
  return amount <= cell.burst and cell.whole >= needed
end

local function all_fit(names, ask, generates)
  for _, name in ipairs(names) do
    local cell = cells[name]
    local is_asked = generates or cell.kind ~= COMPLETION
    if is_asked and not fits(cell, ask[cell.kind]) then return false end
  end
  return true
end

-- Holds amounts in cells; returns what a reservation keeps of it.
local function take(names, ask)
  local turns = {}
  for i, name in ipairs(names) do
    local cell = cells[name]
    turns[i] = 0
    if cell then
      local amount = ask[cell.kind]
      cell.held = cell.held + amount
      if cell.class then turns[i] = cell.turn else cell.whole = cell.whole - amount end
      dirty[name] = true
    end
  end
  return { ask, { 0, 0, 0, 0 }, names, turns }
end

local function each(f, ...)
  local result = {}
  for i = 1, 4 do
    local values = {}
    for j = 1, select('#', ...) do values[j] = select(j, ...)[i] end
    result[i] = f(unpack(values))
  end
  return result
end
local function less(a, b) return each(function(x, y) return max(x - y, 0) end, a, b) end
local function at_most(a, b) return each(min, a, b) end

-- What is certainly spent is held no longer.
local function progress(pieces, spent)
  for _, piece in ipairs(pieces) do
    local reserved, moved, names, turns = piece[1], piece[2], piece[3], piece[4]
    local more = less(at_most(spent, reserved), moved)
    for k = 1, 4 do moved[k] = moved[k] + more[k] end
    local is_any = more[1] + more[2] + more[3] + more[4] > 0
    for i, name in ipairs(is_any and names or {}) do
      local cell = cells[name]
      if cell then
        dirty[name] = true
        local amount = more[cell.kind]
        if not cell.class or cell.turn == turns[i] then
          cell.held = max(cell.held - amount, 0)
          if cell.class then cell.used = cell.used + amount end
        end
      end
    end
    spent = less(spent, reserved)
  end
end

local function settle_piece(piece, spent)
  local reserved, moved, names, turns = piece[1], piece[2], piece[3], piece[4]
  for i, name in ipairs(names) do
    local cell = cells[name]
    if cell then
      local r, m, s = reserved[cell.kind], moved[cell.kind], spent[cell.kind]
      local held = max(r - m, 0)
      if not cell.class then
        cell.held = max(cell.held - held, 0)
        cell.whole = cell.whole + held - (s - m)
        cap(cell)
      elseif cell.turn == turns[i] then
        cell.held = max(cell.held - held, 0)
        cell.used = max(cell.used + s - m, 0)
      else
        -- Of a period that is over only the overrun is owed.
        cell.used = cell.used + max(s - r, 0)
      end
      dirty[name] = true
    end
  end
end

-- Each piece pays for what it holds, the last one for all that is beyond.
local function settle(pieces, spent)
  for i, piece in ipairs(pieces) do
    local part = i == #pieces and spent or at_most(spent, piece[1])
    spent = less(spent, part)
    settle_piece(piece, part)
  end
end

local function extend(pieces, more)
  local piece, last = take(pieces[1][3], more), pieces[#pieces]
  local is_same = #last[4] == #piece[4]
  for i, turn in ipairs(piece[4]) do is_same = is_same and last[4][i] == turn end
  if not is_same then
    pieces[#pieces + 1] = piece
    return
  end
  for k = 1, 4 do last[1][k] = last[1][k] + more[k] end
end

local function names_of(reservations)
  local names, seen = {}, {}
  for _, pieces in pairs(reservations) do
    for _, piece in ipairs(pieces) do
      for _, name in ipairs(piece[3]) do
        if not seen[name] then seen[name] = true names[#names + 1] = name end
      end
    end
  end
  return names
end

local function shown(reply, name)
  local cell = cells[name]
  local state = cell.class and { cell.limit, cell.limit, cell.used, 0, cell.held, cell.start, cell.stop, cell.turn }
    or { cell.limit, cell.burst, cell.whole, cell.fraction, cell.held, cell.at, 0, 0 }
  for _, value in ipairs(state) do reply[#reply + 1] = value end
  reply[#reply + 1] = cell.override
end

local function all_known(names)
  for _, name in ipairs(names) do if not cells[name] then return false end end
  return true
end

-- What is left for the completions beside the prompt, of every quota; nil: less than is worth admitting.
local function clamped(names, ask, completions)
  local room = math.huge
  for _, name in ipairs(names) do
    local cell = cells[name]
    local left = max(cell.class and cell.limit - cell.used - cell.held or cell.whole, 0)
    if cell.kind == TOTAL then room = min(room, max(left - ask[PROMPT], 0)) end
    if cell.kind == COMPLETION then room = min(room, left) end
  end
  local one = floor(room / completions)
  local completion = min(one * completions, MAX_AMOUNT)
  if one < SMALLEST_CLAMP or completion >= ask[COMPLETION] then return nil end
  local total = min(ask[PROMPT] + completion, MAX_AMOUNT)
  local lowered = { total, ask[PROMPT], completion, ask[REQUESTS] }
  return all_fit(names, lowered, true) and lowered or nil
end
