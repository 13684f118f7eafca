-- The shared counters of one environment: everything that has to happen at once, and nothing else.
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

local run = {}

-- Holds room for a request in all cells or in none. Returns how many requests are in flight, how many nodes are alive,
-- and the states before.
function run.reserve()
  local id, most, mode, generates = text(), int(), text(), int() == 1
  local ask, completions = amounts(), int()
  local names = texts(int())
  local known = redis.call('HMGET', meta_key, 's:' .. session, 'in_flight', 'alive')
  load(names)
  local in_flight = tonumber(known[2]) or 0
  if (tonumber(known[1]) or 0) <= 0 or not all_known(names) then return { UNKNOWN, now } end
  if not advance(names) then return { BOUNDS, now } end
  local reply = { FULL, now, in_flight, tonumber(known[3]) or 1 }
  for _, name in ipairs(names) do
    shown(reply, name)
    dirty[name] = true
  end
  if most == 0 or in_flight < most then
    local held = all_fit(names, ask, generates) and ask
    if not held and mode == 'clamp' and ask[COMPLETION] > 0 then held = clamped(names, ask, completions) end
    if not held and mode == 'watch' then held = ask end
    reply[1] = held and ADMITTED or DENIED
    if held then
      redis.call('HSET', own_key, id, cmsgpack.pack({ take(names, held) }))
      redis.call('HINCRBY', meta_key, 'in_flight', 1)
    end
  end
  save()
  return reply
end

-- What a node has spent of a quota while it was cut off and has not come back since; of a calendar's period only while
-- it runs.
local function pay(name, amount, turn)
  local cell = cells[name]
  if not cell or (cell.class and cell.turn ~= turn) then return end
  if cell.class then cell.used = cell.used + amount else cell.whole = cell.whole - amount end
  dirty[name] = true
end

local function lease_pieces(packed) return packed and cmsgpack.unpack(packed) or {} end

local function lease_of(packed)
  local lease = {}
  for _, piece in ipairs(lease_pieces(packed)) do lease[piece[3][1]] = piece end
  return lease
end

-- What is left of a lease in a cell; of a period that is over nothing is.
local function leased(lease, name)
  local piece, cell = lease[name], cells[name]
  if not piece or not cell or (cell.class and piece[4][1] ~= cell.turn) then return 0 end
  return piece[1][cell.kind]
end

local function set_leased(lease, name, amount)
  local cell = cells[name]
  local reserved = { 0, 0, 0, 0 }
  reserved[cell.kind] = amount
  lease[name] = { reserved, { 0, 0, 0, 0 }, { name }, { cell.class and cell.turn or 0 } }
end

local function save_lease(lease)
  local pieces = {}
  for _, piece in pairs(lease) do pieces[#pieces + 1] = piece end
  if #pieces == 0 then
    redis.call('HDEL', own_key, LEASE)
  else
    redis.call('HSET', own_key, LEASE, cmsgpack.pack(pieces))
  end
end

-- A request that its node has admitted out of its lease: what it holds is taken from there, and the rest, if the lease
-- has been lost meanwhile, from the cells.
local function open(lease, names, ask)
  for _, name in ipairs(names) do
    local cell = cells[name]
    if cell then
      local amount = min(leased(lease, name), ask[cell.kind])
      set_leased(lease, name, leased(lease, name) - amount)
      cell.held = cell.held - amount
      if not cell.class then cell.whole = cell.whole + amount end
    end
  end
  return { take(names, ask) }
end

-- How often what was used of each was reset.
local function resets_of(names)
  local resets = {}
  for i, name in ipairs(names) do resets[i] = cells[name] and cells[name].resets or 0 end
  return resets
end

-- Takes back that a reservation was charged in full: its node was only cut off. Of a quota that was reset since there is
-- nothing to take back.
local function hold_again(pieces)
  for _, piece in ipairs(pieces) do
    local reserved, moved, names, turns = piece[1], piece[2], piece[3], piece[4]
    local before, resets = piece[5] or {}, resets_of(names)
    for i, name in ipairs(names) do
      local cell = cells[name]
      if cell and (not cell.class or cell.turn == turns[i]) then
        local held = max(reserved[cell.kind] - moved[cell.kind], 0)
        local is_charged = (before[i] or 0) == resets[i]
        cell.held = cell.held + held
        if not cell.class then
          if not is_charged then cell.whole = cell.whole - held end
          cap(cell)
        elseif is_charged then
          cell.used = max(cell.used - held, 0)
        end
        dirty[name] = true
      end
    end
  end
end

-- The steps of a call that were not applied yet, and the number of its last one.
local function new_steps(applied)
  local first, count, steps = int(), int(), {}
  for i = 0, count - 1 do
    local step = { what = text(), id = text(), amounts = amounts() }
    if step.what == 'open' then step.names = texts(int()) end
    if first + i > applied then steps[#steps + 1] = step end
  end
  return steps, first + count - 1
end

-- The reservations that steps are about, and which of these were charged: such a step comes late, before its node has said
-- that it still holds them.
local function find_all(steps)
  local reservations, charged = {}, {}
  for _, step in ipairs(steps) do
    local id = step.id
    if step.what ~= 'pay' and not reservations[id] then
      local packed = redis.call('HGET', own_key, id)
      if not packed and id ~= LEASE then
        packed = redis.call('HGET', charged_key(session), id)
        charged[id] = packed or nil
      end
      reservations[id] = packed and cmsgpack.unpack(packed) or nil
    end
  end
  return reservations, charged
end

-- Loads all cells that steps change, beside those of reservations; returns their names.
local function load_changed(steps, reservations)
  local names = names_of(reservations)
  for _, step in ipairs(steps) do
    if step.what == 'pay' then names[#names + 1] = step.id end
    for _, name in ipairs(step.names or {}) do names[#names + 1] = name end
  end
  load(names)
  return names
end

-- What has become of reservations, in order. What was applied already is not applied again. Returns how many steps were, and
-- how the cells stand that the node asks for.
function run.apply()
  local known = redis.call('HMGET', meta_key, 's:' .. session, 'q:' .. session)
  -- Of a session that is over, or was lost, a step would find nothing and be forgotten.
  if (tonumber(known[1]) or 0) <= 0 then return { UNKNOWN, now } end
  local applied = tonumber(known[2]) or 0
  local steps, last = new_steps(applied)
  local asked_for = texts(int())
  local reservations, charged = find_all(steps)
  local names = load_changed(steps, reservations)
  load(asked_for)
  if not all_known(asked_for) then return { UNKNOWN, now } end
  if not advance(names) or not advance(asked_for) then return { BOUNDS, now } end
  local gone, lease = 0, nil
  for id in pairs(charged) do
    hold_again(reservations[id])
    redis.call('HDEL', charged_key(session), id)
    gone = gone - 1
  end
  for _, step in ipairs(steps) do
    local id, what = step.id, step.what
    local pieces = reservations[id]
    if what == 'pay' then
      pay(id, step.amounts[1], step.amounts[2])
    elseif what == 'open' then
      lease = lease or lease_of(redis.call('HGET', own_key, LEASE))
      if not pieces then
        reservations[id] = open(lease, step.names, step.amounts)
        gone = gone - 1
      end
    elseif id == LEASE then
      for _, piece in pairs(lease or pieces or {}) do settle_piece(piece, { 0, 0, 0, 0 }) end
      reservations[id], lease = nil, lease and {}
      redis.call('HDEL', own_key, id)
    elseif pieces and what == 'settle' then
      settle(pieces, step.amounts)
      reservations[id] = nil
      redis.call('HDEL', own_key, id)
      gone = gone + 1
    elseif pieces then
      if what == 'extend' then extend(pieces, step.amounts) else progress(pieces, step.amounts) end
    end
  end
  for id, pieces in pairs(reservations) do redis.call('HSET', own_key, id, cmsgpack.pack(pieces)) end
  if lease then save_lease(lease) end
  if gone ~= 0 then redis.call('HINCRBY', meta_key, 'in_flight', -gone) end
  redis.call('HSET', meta_key, 'q:' .. session, max(applied, last))
  save()
  local reply = { DONE, now, #steps }
  for _, name in ipairs(asked_for) do shown(reply, name) end
  return reply
end

-- Other limits for now, of all these cells or of none, or with override 0 the config's again.
function run.limit()
  local override, changes = int(), {}
  for i = 1, int() do changes[i] = { text(), int(), int() } end
  local names = redis.call('HKEYS', cells_key)
  load(names)
  for _, change in ipairs(changes) do
    if not cells[change[1]] then return { UNKNOWN, now } end
  end
  if not advance(names) then return { BOUNDS, now } end
  for _, change in ipairs(changes) do
    local cell, limit, burst = cells[change[1]], change[2], change[3]
    if not cell.class then cell.whole = cell.whole + burst - cell.burst end
    cell.limit, cell.burst, cell.override = limit, burst, override
  end
  for _, name in ipairs(names) do dirty[name] = true end
  save()
  return { DONE, now }
end

-- Everything whole again, but for what is held.
function run.reset()
  local names = redis.call('HKEYS', cells_key)
  if #names == 0 then return { UNKNOWN, now } end
  load(names)
  if not advance(names) then return { BOUNDS, now } end
  for _, name in ipairs(names) do
    local cell = cells[name]
    if cell.class then cell.used = 0 else cell.whole, cell.fraction = cell.burst - cell.held, 0 end
    cell.resets = (cell.resets or 0) + 1
    dirty[name] = true
  end
  save()
  return { DONE, now }
end

-- A cell as a node gives it: kind, class (empty: it rolls), period, limit, burst, whose limit, and what is left of it
-- when nothing is held: level and fraction, or what was used and in which turn. Beside it, limit and burst of its config.
local function given()
  local kind, class, per = int(), text(), int()
  local configured = { limit = int(), burst = int() }
  local limit, burst, override = int(), int(), int()
  local whole, fraction, turn = int(), int(), int()
  local cell = { kind = kind, per = per, limit = limit, burst = burst, held = 0, override = override, seen = now }
  if class == '' then
    cell.whole, cell.fraction, cell.at = whole, fraction, now
    return cell, configured
  end
  local period = bounds[class]
  if not period or now < period[1] or now >= period[2] then return nil end
  cell.class, cell.used, cell.turn, cell.start, cell.stop = class, whole, turn, period[1], period[2]
  return cell, configured
end

-- Takes up a reservation that its node still has, and the server no longer: it was lost with the cells. `is_news`: the
-- server has kept those and has never heard of it, so that what is spent of it has not been counted either.
local function take_up(pieces, is_news)
  for _, piece in ipairs(pieces) do
    local reserved, moved, names, turns = piece[1], piece[2], piece[3], piece[4]
    for i, name in ipairs(names) do
      local cell = cells[name]
      if cell and (not cell.class or cell.turn == turns[i]) then
        local held = max(reserved[cell.kind] - moved[cell.kind], 0)
        local spent = is_news and moved[cell.kind] or 0
        cell.held = cell.held + held
        if cell.class then cell.used = cell.used + spent else cell.whole = cell.whole - held - spent end
        dirty[name] = true
      end
    end
  end
end

-- Charges a reservation in full: its node is dead, or has forgotten it.
local function charge_in_full(pieces)
  for _, piece in ipairs(pieces) do settle_piece(piece, piece[1]) end
end

-- Of what nodes know of a cell that was lost, the least is left.
local function regain(cell, node)
  if cell.class then
    if cell.turn == node.turn then cell.used = max(cell.used, node.used) end
  else
    cell.whole = min(cell.whole, node.whole - cell.held)
  end
end

-- Sessions that are over, each with the last step applied: by the day on which all was charged, so that they are forgotten
-- by days, and nobody has to look through them.
local function over_key(days_ago)
  return meta_key .. ':over:' .. string.format('%.0f', floor(now / FORGET_MS) - days_ago)
end

local function bury(of)
  local applied = redis.call('HGET', meta_key, 'q:' .. of) or 0
  redis.call('HDEL', meta_key, 's:' .. of, 'q:' .. of, 'o:' .. of)
  redis.call('HSET', over_key(0), of, applied)
  redis.call('PEXPIRE', over_key(0), 2 * FORGET_MS)
end

-- The last step applied of this session, if it is over.
local function buried()
  return redis.call('HGET', over_key(0), session) or redis.call('HGET', over_key(1), session)
end

local function count_alive()
  local fields, alive = redis.call('HGETALL', meta_key), 0
  for i = 1, #fields, 2 do
    if fields[i]:sub(1, 2) == 's:' and tonumber(fields[i + 1]) > now then alive = alive + 1 end
  end
  redis.call('HSET', meta_key, 'alive', alive)
end

-- A node takes part. Cells that are missing are made as it has them; the limits of the others are those of the newest
-- config, by its stamp, or an administrator's. Returns how many cells were made, how many have other limits than the
-- node's, whether the session was still known, and for how many milliseconds others are still to be waited for, since the
-- server had lost what the nodes knew.
function run.join()
  local stamp, was_here, count = int(), int() == 1, int()
  local names, from_node, configured = {}, {}, {}
  for i = 1, count do
    local name = text()
    names[i] = name
    from_node[name], configured[name] = given()
    if not from_node[name] then return { BOUNDS, now } end
  end
  local known = redis.call('HMGET', meta_key, 's:' .. session, 'stamp', 'regains')
  local newest, regains = tonumber(known[2]) or 0, tonumber(known[3]) or 0
  local applied = not known[1] and buried()
  local is_kept = known[1] or applied
  load(names)
  if not advance(names) then return { BOUNDS, now } end
  if was_here and not is_kept and regains <= now then
    regains = now + REGAIN_MS
    redis.call('HSET', meta_key, 'regains', regains)
  end
  local made, differing = 0, 0
  for _, name in ipairs(names) do
    local cell, node, new = cells[name], from_node[name], configured[name]
    if cell and stamp > newest and cell.override == 0 and (cell.limit ~= new.limit or cell.burst ~= new.burst) then
      if not cell.class then cell.whole = cell.whole + new.burst - cell.burst end
      cell.limit, cell.burst, dirty[name] = new.limit, new.burst, true
      differing = differing + 1
    elseif not cell then
      cells[name], dirty[name], made = node, true, made + 1
    elseif cell.limit ~= node.limit or cell.burst ~= node.burst then
      differing = differing + 1
    elseif was_here and now < regains then
      regain(cell, node)
      dirty[name] = true
    end
  end
  redis.call('HSET', meta_key, 's:' .. session, now + SESSION_MS, 'stamp', max(stamp, newest))
  redis.call('HDEL', meta_key, 'o:' .. session)
  if applied then redis.call('HSET', meta_key, 'q:' .. session, applied) end
  count_alive()
  save()
  return { DONE, now, made, differing, is_kept and 1 or 0, max(regains - now, 0) }
end

-- What a node that takes part again still holds, and the server may not: as it was charged, or as it was lost. What the
-- node has told it to settle is over.
function run.hold()
  local is_news, found, all = int() == 1, {}, {}
  for i = 1, int() do
    local one = { id = text(), settled_by = int(), pieces = {} }
    for k = 1, int() do
      local piece = { amounts(), amounts(), {}, {} }
      for j = 1, int() do piece[3][j], piece[4][j] = text(), int() end
      one.pieces[k] = piece
    end
    found[i] = one
  end
  if not is_known() then return { UNKNOWN, now } end
  local last = tonumber(redis.call('HGET', meta_key, 'q:' .. session)) or 0
  local missing = {}
  for _, one in ipairs(found) do
    local is_over = one.settled_by > 0 and one.settled_by <= last
    if not is_over and redis.call('HEXISTS', own_key, one.id) == 0 then
      one.charged = redis.call('HGET', charged_key(session), one.id)
      if one.charged then one.pieces = cmsgpack.unpack(one.charged) end
      if #one.pieces > 0 then missing[#missing + 1], all[one.id] = one, one.pieces end
    end
  end
  local touched = names_of(all)
  load(touched)
  if not advance(touched) then return { BOUNDS, now } end
  for _, one in ipairs(missing) do
    if one.charged then hold_again(one.pieces) else take_up(one.pieces, is_news) end
    redis.call('HSET', own_key, one.id, cmsgpack.pack(one.pieces))
    redis.call('HDEL', charged_key(session), one.id)
  end
  if #missing > 0 then redis.call('HINCRBY', meta_key, 'in_flight', #missing) end
  save()
  return { DONE, now }
end

-- A node that takes part again holds nothing beside these. What else the server has of it has ended, and that was lost, as
-- by a server that is started again with what it had written last: it is charged in full. What it had leased goes back.
-- Returns how many are left to be charged.
function run.only()
  local is_held = {}
  for _ = 1, int() do is_held[text()] = true end
  if not is_known() then return { UNKNOWN, now } end
  local charged, orphans, count, left = charged_key(session), {}, 0, 0
  local charged_lease = lease_pieces(redis.call('HGET', charged, LEASE))
  -- There may be both, where a request out of the lease was told of late.
  orphans[LEASE] = lease_pieces(redis.call('HGET', own_key, LEASE))
  for _, piece in ipairs(charged_lease) do table.insert(orphans[LEASE], piece) end
  for _, id in ipairs(redis.call('HKEYS', own_key)) do
    if id ~= LEASE and not is_held[id] then
      if count < MOST_EXPIRED then
        orphans[id] = cmsgpack.unpack(redis.call('HGET', own_key, id))
        count = count + 1
      else
        left = left + 1
      end
    end
  end
  local names = names_of(orphans)
  load(names)
  if not advance(names) then return { BOUNDS, now } end
  hold_again(charged_lease)
  for id, pieces in pairs(orphans) do
    if id ~= LEASE then
      charge_in_full(pieces)
    else
      for _, piece in ipairs(pieces) do settle_piece(piece, { 0, 0, 0, 0 }) end
    end
    redis.call('HDEL', own_key, id)
  end
  redis.call('HDEL', charged, LEASE)
  if count > 0 then redis.call('HINCRBY', meta_key, 'in_flight', -count) end
  save()
  return { DONE, now, left }
end

-- Charges in full some of what a session held that is over, and keeps it apart, should its node come back. Returns whether
-- that was all, and how much it was. A scan begins where all may be gone already, and then finds nothing though there is more.
local function charge(over)
  local from, to = reserved_key(over), charged_key(over)
  local cursor, found = 0, {}
  repeat
    local part = redis.call('HSCAN', from, cursor, 'COUNT', MOST_EXPIRED)
    cursor, found = part[1], part[2]
  until #found > 0 or cursor == '0'
  local reservations, count = {}, 0
  for i = 1, #found, 2 do reservations[found[i]] = cmsgpack.unpack(found[i + 1]) end
  local names = names_of(reservations)
  load(names)
  if not advance(names) then return false, 0 end
  for i = 1, #found, 2 do
    local id = found[i]
    charge_in_full(reservations[id])
    for _, piece in ipairs(reservations[id]) do piece[5] = resets_of(piece[3]) end
    redis.call('HSET', to, id, cmsgpack.pack(reservations[id]))
    redis.call('HDEL', from, id)
    if id ~= LEASE then count = count + 1 end
  end
  if #found == 0 then return true, 0 end
  redis.call('PEXPIRE', to, FORGET_MS)
  if count > 0 then redis.call('HINCRBY', meta_key, 'in_flight', -count) end
  return redis.call('HLEN', from) == 0, #found / 2
end

-- A cell is in use. Else it stays as it is: to be looked at changes nothing.
local function note_use(name)
  cells[name].seen = now
  if dirty[name] then return end
  local cell = cmsgpack.unpack(redis.call('HGET', cells_key, name))
  cell.seen = now
  redis.call('HSET', cells_key, name, cmsgpack.pack(cell))
end

-- Notes that these cells are in use, now and then, and forgets those that have not been for long.
local function tidy(names)
  local longest = FORGET_MS
  for _, name in ipairs(names) do
    local cell = cells[name]
    longest = max(longest, kept_ms(cell))
    if now - (cell.seen or 0) > SEEN_MS then note_use(name) end
  end
  -- Others may have quotas of longer periods.
  for _, key in ipairs({ cells_key, meta_key, own_key }) do
    if redis.call('PTTL', key) < longest then redis.call('PEXPIRE', key, longest) end
  end
  if now - (tonumber(redis.call('HGET', meta_key, 'tidied')) or 0) < SEEN_MS then return end
  redis.call('HSET', meta_key, 'tidied', now)
  local all = redis.call('HKEYS', cells_key)
  load(all)
  for _, name in ipairs(all) do
    local cell = cells[name]
    if cell.held == 0 and now - (cell.seen or now) > kept_ms(cell) then
      redis.call('HDEL', cells_key, name)
      cells[name], dirty[name] = false, nil
    end
  end
end

-- A node is alive. Returns how many are, and how all cells stand.
function run.beat()
  local names = texts(int())
  load(names)
  if not is_known() or not all_known(names) then return { UNKNOWN, now } end
  if not advance(names) then return { BOUNDS, now } end
  local silence = now - (tonumber(redis.call('HGET', meta_key, 'beat')) or now)
  redis.call('HSET', meta_key, 'beat', now, 's:' .. session, now + SESSION_MS)
  local fields, over, alive = redis.call('HGETALL', meta_key), {}, 1
  for i = 1, #fields, 2 do
    local field, value = fields[i], tonumber(fields[i + 1])
    local what, other = field:sub(1, 2), field:sub(3)
    if what == 'o:' then
      over[#over + 1] = other
    elseif what == 's:' and other ~= session then
      -- Also where the clock was stepped back.
      local is_given_time = value > now + SESSION_MS or (value > 0 and silence > SILENCE_MS)
      if is_given_time then redis.call('HSET', meta_key, field, now + SESSION_MS) end
      if is_given_time or value > now then
        alive = alive + 1
      elseif value > 0 then
        -- From now on it is over, though it may take some time until all is charged.
        redis.call('HSET', meta_key, field, -now, 'o:' .. other, now)
        over[#over + 1] = other
      end
    end
  end
  local charged = 0
  for _, other in ipairs(over) do
    -- The rest has time until the next beat: others wait for the server.
    if charged >= MOST_EXPIRED then break end
    local is_all, count = charge(other)
    charged = charged + count
    if is_all then bury(other) end
  end
  redis.call('HSET', meta_key, 'alive', alive)
  tidy(names)
  save()
  local reply = { DONE, now, alive, tonumber(redis.call('HGET', meta_key, 'in_flight')) or 0 }
  for _, name in ipairs(names) do shown(reply, name) end
  return reply
end

-- A node wants so much of each cell to admit requests out of. A tenth of each is never leased. Returns how much it has
-- got of each, beside what it had.
function run.lease()
  local names, wanted = {}, {}
  for i = 1, int() do names[i], wanted[i] = text(), int() end
  load(names)
  if not is_known() or not all_known(names) then return { UNKNOWN, now } end
  if not advance(names) then return { BOUNDS, now } end
  local lease = lease_of(redis.call('HGET', own_key, LEASE))
  local reply = { DONE, now }
  for i, name in ipairs(names) do
    local cell, has = cells[name], leased(lease, name)
    local left = cell.class and cell.limit - cell.used - cell.held or cell.whole
    local kept = floor((cell.class and cell.limit or cell.burst) / 10)
    local more = max(min(wanted[i] - has, left - kept), 0)
    cell.held = cell.held + more
    if not cell.class then cell.whole = cell.whole - more end
    set_leased(lease, name, has + more)
    dirty[name] = true
    reply[#reply + 1] = more
  end
  save_lease(lease)
  save()
  for _, name in ipairs(names) do shown(reply, name) end
  return reply
end

-- A node goes: it has settled everything. If not, it is over like one that has died, and what it holds is charged.
function run.leave()
  if redis.call('HLEN', own_key) > 0 then return { DONE, now } end
  redis.call('HDEL', meta_key, 's:' .. session, 'q:' .. session)
  return { DONE, now }
end

return run[command]()
