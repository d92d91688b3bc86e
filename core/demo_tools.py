"""The ten tools of the demo: their schemas, how people ask for them, and the values that fill the sentences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


def _split(text: str) -> tuple[str, ...]:
    return tuple(" ".join(part.split()) for part in text.split("|"))


# Slot values: the first text is for all files, the second for held-out and tuning rows only. ------------------------
# `shown=argument` where the two differ; units are drawn as a pair.

VALUES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    name: (_split(known), _split(new) if new else ())
    for name, known, new in (
        (
            "minutes",
            "2|3|4|5|6|7|8|10|12|14|15|16|18|20|22|25|30|35|40|45|50|60|75|90",
            "9|11|17|24|28|33|55|70",
        ),
        ("weekday", "Monday|Tuesday|Wednesday|Thursday|Friday|Saturday|Sunday", ""),
        (
            "time",
            "8 am|9 am|10 am|11 am|noon|1 pm|2 pm|3 pm|4 pm|6 pm|7 pm|8 pm|9:30 am|4:15 pm",
            "5 pm|10:30 am|2:45 pm",
        ),
        (
            "title",
            """yoga class|team meeting|lunch with Sara|piano lesson|car service|haircut|book club|job interview
            |vet visit|dinner with Tom|swimming lesson|project review|birthday party|choir practice|eye test|tax call
            |house tour""",
            "chess club|doctor visit|coffee with Lena|football training|board meeting|flu shot|wine tasting",
        ),
        (
            "person",
            "Anna|Ben|Carlos|Dana|Emma|Felix|Grace|Hugo|Iris|Jack|Kim|Leo|Maria|Nina|Omar|Paul|Mom|Dad",
            "Priya|Quentin|Rosa|Sam|Tara|Victor",
        ),
        (
            "news",
            """I am running late|dinner is ready|the train is delayed|I will be there soon|the meeting moved to room 12
            |the keys are under the mat|we need more milk|the package arrived|I lost my phone|the party starts at eight
            |the car is fixed|school is closed tomorrow|I got the job|the door code is 4417|the game was cancelled
            |I am at the station|the report is finished|we won the match|I cannot come tonight|the dog is fine""",
            """the plumber is here|my flight landed|I found the tickets|the wifi is down|lunch is on me
            |the test went well|I am stuck in traffic""",
        ),
        (
            "note",
            """the wifi password is blue42|aunt May likes orchids|parking spot 31|milk, eggs and bread
            |ideas for the garden|the spare key is in the shed|rent is due on the 5th|gift ideas for Tom|shoes in size 9
            |the recipe needs two lemons|gate 14 for the ferry|cat food and litter|the locker number is 207
            |the door code is 4417|the meeting moved to room 12|the keys are under the mat|the car is fixed
            |the plants need water|paint the fence green|books to read this summer""",
            """batteries and candles|the bike is in the cellar|ask about the red sofa|seat 22 on the bus
            |the cake takes six eggs|names for the puppy|the alarm code is 9035""",
        ),
        (
            "city",
            """Paris|London|Berlin|Madrid|Rome|Oslo|Tokyo|Boston|Chicago|Denver|Dublin|Vienna|Athens|Cairo|Lima|Sydney
            |Toronto|Seattle|Mumbai|Prague|Zurich|New York""",
            "Lisbon|Helsinki|Nairobi|Austin|Seoul|Warsaw|San Diego",
        ),
        (
            "when",
            "today|tomorrow|on Monday=Monday|on Tuesday=Tuesday|on Thursday=Thursday|on Friday=Friday|on Sunday=Sunday",
            "on Wednesday=Wednesday|on Saturday=Saturday",
        ),
        (
            "query",
            """cheap flights to Rome|the history of chess|vegan pancake recipes|the tallest building|used road bikes
            |symptoms of flu|solar panel prices|the causes of storms|rain boots for kids|the best jazz albums
            |kitchen timers|world cup results|hotels near the beach|low light plants|running shoes|how tides work
            |museum opening hours|train strikes|home workouts|the moon landing|guitar chords|cat breeds|note apps""",
            """black holes|sourdough starters|second hand cameras|weather balloons|the origin of tea|smart light bulbs
            |marathon training plans|how magnets work""",
        ),
        (
            "artist",
            """Queen|Nina Simone|Bob Marley|Adele|Miles Davis|Abba|Coldplay|Johnny Cash|Daft Punk|Mozart|Metallica
            |Norah Jones|David Bowie|Shakira|Bach|Drake|Fleetwood Mac|Prince|the Beatles|Taylor Swift""",
            "Radiohead|Dolly Parton|Stevie Wonder|Chopin|Madonna|Ella Fitzgerald|the Doors",
        ),
        ("state", "on|off", ""),
        (
            "room",
            "kitchen|bedroom|living room|bathroom|hallway|office|garage|dining room|basement|nursery|garden|porch",
            "attic|guest room|study|laundry room",
        ),
        (
            "place",
            """Central Station|Lake Park|City Hall|Heathrow Airport|Oak Street|Hill Hospital|Maple School|Riverside Mall
            |Victoria Square|Green Theater|Harbor Bridge|Union Stadium|Elm Library|Sunset Beach|Park Hotel|North Market
            |Castle Museum|West Clinic|Rose Garden|Mill Road""",
            "Cedar Avenue|Grand Cinema|Pine Valley|East Gate|Liberty Tower|Willow Zoo",
        ),
        ("mode", "car|bike|bus|train", ""),
        (
            "value",
            "2|3|4|5|6|7|8|10|12|15|16|20|24|25|30|40|50|60|75|80|100|120|150|200|1.5|2.5",
            "9|13|18|35|65|90|3.5",
        ),
        (
            "units",
            """miles to kilometers|kilometers to miles|pounds to kilograms|kilograms to pounds|feet to meters
            |meters to feet|inches to centimeters|centimeters to inches|gallons to liters|liters to gallons
            |ounces to grams|grams to ounces""",
            "yards to meters|cups to liters",
        ),
    )
}
NUMBERS = ("minutes", "value")

# Values for KTO rows alone: what people say once they use the model.
FEEDBACK_VALUES: dict[str, tuple[str, ...]] = {
    name: _split(text)
    for name, text in (
        ("minutes", "19|21|27|32|36|42|48|52|80|85|95"),
        ("time", "7 am|9 pm|7:15 pm|11:45 am|3:30 pm|8:20 am"),
        (
            "title",
            """dentist|dance rehearsal|guitar lesson|budget review|brunch with Zoe|parent evening|museum tour
            |blood donation|driving test|cooking course|sister's wedding|farewell for Jonas""",
        ),
        ("person", "Yusuf|Ingrid|Walter|Chloe|Dmitri|Amara|Oscar|Helen|Uncle Joe|Grandma|Xavier|Beatriz"),
        (
            "news",
            """the heating is broken|my bike was stolen|the concert starts at nine|I left the stove on
            |the baby is asleep|our table is booked|the bus leaves at 6:40|I passed the exam|the cat is missing
            |grandpa sends his love|the shop closes early""",
        ),
        (
            "note",
            """the gym opens at seven|Lily is allergic to nuts|platform 3 for the night bus|sugar, rice and olive oil
            |the tent is behind the shelf|return the library card|songs for the wedding|shelf 12 in the basement
            |the printer needs ink|call about the broken fridge""",
        ),
        ("city", "Bogota|Krakow|Marrakesh|Osaka|Portland|Reykjavik|Hanoi|Belfast|Geneva|Dallas|Perth|Santiago"),
        (
            "query",
            """rainy day games|the price of copper|how bees find home|electric scooters|Greek islands|the fastest train
            |easy card tricks|what owls eat|old film posters|cures for hiccups|the rules of rugby""",
        ),
        (
            "artist",
            """Santana|Beyonce|Vivaldi|Pink Floyd|the Rolling Stones|Whitney Houston|Arcade Fire|Sade|Kraftwerk
            |the Kinks|Edith Piaf|Tina Turner""",
        ),
        ("room", "pantry|larder|playroom|library|lobby|conservatory|workshop|sauna|dressing room|roof terrace|gym"),
        (
            "place",
            """Baker Street|Crystal Lake|Jefferson High School|Marina Bay|Old Town Hall|Queens Hospital|Sunrise Bakery
            |Harvard Square|Kings Cross|Copper Hill|Orchard Road|Summit Arena""",
        ),
        ("value", "11|14|22|45|85|110|4.5|7.5|0.5|250|300"),
        (
            "units",
            """quarts to liters|pints to gallons|grams to pounds|miles to feet|centimeters to meters|tons to kilograms
            |feet to inches|liters to pints""",
        ),
    )
}


@dataclass(frozen=True)
class Tool:
    """One tool: its schema, how people ask for it, and what a weak model calls instead.

    `slots` maps argument to slot name, in the order of the answer. A phrasing may fix a slot (`state=on>…`).
    Of `new` phrasings the even ones are for the held-out file, the odd ones for the tuning file. `feedback` phrasings
    are for KTO rows: what people say once they use the model is not only what its makers thought of. `weak` are the
    arguments that go wrong, as often as they stand there.
    """

    name: str
    description: str
    slots: dict[str, str]
    phrasings: tuple[str, ...]
    new: tuple[str, ...]
    feedback: tuple[str, ...]
    mistaken: tuple[tuple[str, dict[str, str]], ...]
    invented: tuple[str, Any]
    weak: tuple[str, ...]

    def schema(self) -> dict[str, Any]:
        """The tool as a JSON schema, the way chat APIs take it."""
        properties: dict[str, dict[str, Any]] = {}
        for argument, slot in self.slots.items():
            properties[argument] = {"type": "number" if slot == "value" else "integer" if slot in NUMBERS else "string"}
            if slot in ("state", "mode"):
                properties[argument]["enum"] = list(VALUES[slot][0])
        parameters = {"type": "object", "properties": properties, "required": list(properties)}
        return {"name": self.name, "description": self.description, "parameters": parameters}


TOOLS = (
    Tool(
        "set_timer",
        "Start a countdown.",
        {"minutes": "minutes"},
        _split("""set a timer for {minutes} minutes|start a {minutes} minute timer|timer, {minutes} minutes
        |{minutes} minute timer|count down {minutes} minutes|start a countdown of {minutes} minutes
        |wake me in {minutes} minutes|ping me in {minutes} minutes|let me know when {minutes} minutes are up
        |the pasta needs {minutes} minutes, keep track|the cake bakes for {minutes} minutes, time it
        |can you time {minutes} minutes?|beep after {minutes} minutes|give me {minutes} minutes on the clock
        |I will nap for {minutes} minutes, do not let me oversleep|remind me in {minutes} minutes"""),
        _split("""the eggs boil for {minutes} minutes, tell me when they are done|ring in {minutes} minutes
        |alert me once {minutes} minutes have passed|buzz me {minutes} minutes from now
        |I have {minutes} minutes for this puzzle, start now|put {minutes} minutes on the kitchen timer
        |my tea steeps for {minutes} minutes, watch the clock|can I get a countdown of {minutes} minutes?"""),
        _split("""run a timer of {minutes} minutes|stop me after {minutes} minutes|measure {minutes} minutes for me
        |the rice cooks for {minutes} minutes, keep the time|make it {minutes} minutes on the timer
        |the laundry takes {minutes} minutes, do not let me forget it|I want to stretch for {minutes} minutes, time me
        |a {minutes} minute break starts here, time it|call me back in {minutes} minutes"""),
        (
            ("add_event", {"title": "timer", "day": "today", "time": "{minutes} minutes"}),
            ("convert_units", {"value": "{minutes}", "from": "minutes", "to": "hours"}),
        ),
        ("label", "timer"),
        ("minutes",),
    ),
    Tool(
        "add_event",
        "Put an event into the calendar.",
        {"title": "title", "day": "weekday", "time": "time"},
        _split("""add {title} to my calendar on {weekday} at {time}|schedule {title} for {weekday} at {time}
        |put {title} on {weekday} at {time} in my calendar|book {title} for {weekday}, {time}
        |I have {title} on {weekday} at {time}, put it in the calendar|new event: {title}, {weekday}, {time}
        |remind me of {title} on {weekday} at {time}|{title} on {weekday} at {time}, do not let me forget
        |set up {title} on {weekday} at {time}|plan {title} for {weekday} at {time}|calendar: {title} {weekday} {time}
        |make an appointment for {title} on {weekday} at {time}|block {weekday} at {time} for {title}
        |can you add {title} on {weekday} at {time}?|{title} is on {weekday} at {time}, save the date"""),
        _split("""pencil in {title} for {weekday} at {time}|reserve {time} on {weekday} for {title}
        |can {title} go into my diary for {weekday}, {time}?|arrange {title}, {weekday} at {time}
        |mark my calendar: {title} at {time} on {weekday}|get {title} on the schedule, {weekday} at {time}
        |I must be at {title} on {weekday} at {time}, enter it
        |on {weekday} at {time} I have {title}, keep that free"""),
        _split("""my calendar needs {title} on {weekday} at {time}|organize {title} for {weekday} at {time}
        |I agreed to {title} on {weekday} at {time}, add that|new appointment on {weekday} at {time}: {title}
        |if {weekday} at {time} is open, book {title}|{weekday} at {time} is when {title} starts, plan it
        |fix {title} for {weekday}, {time}|write {title} into the calendar, {weekday} at {time}
        |do not let me miss {title} on {weekday} at {time}"""),
        (
            ("set_timer", {"minutes": "60"}),
            ("send_message", {"to": "me", "text": "{title} on {weekday}"}),
        ),
        ("duration", 60),
        ("title", "title", "time", "day"),
    ),
    Tool(
        "send_message",
        "Send a text message to a person.",
        {"to": "person", "text": "news"},
        _split("""tell {person} {news}|text {person}: {news}|text {person} that {news}|send {person} a message: {news}
        |message {person} that {news}|let {person} know that {news}|write to {person}: {news}|tell {person} that {news}
        |send a text to {person} saying {news}|can you tell {person} that {news}?|inform {person} that {news}
        |drop {person} a line: {news}|{person} should know that {news}|say to {person} that {news}
        |I need {person} to know that {news}|message for {person}: {news}"""),
        _split("""pass this on to {person}: {news}|shoot {person} a quick text: {news}|notify {person}: {news}
        |give {person} the message that {news}|make sure {person} hears that {news}|reply to {person} with: {news}
        |{person} is waiting for news, say that {news}|can {person} be told that {news}?"""),
        _split("""send {person} this: {news}|update {person}: {news}|get word to {person} that {news}
        |explain to {person} that {news}|report to {person} that {news}|warn {person} that {news}
        |can you write {person} that {news}?|I promised to tell {person} that {news}|type to {person}: {news}"""),
        (
            ("create_note", {"text": "{news}"}),
            ("search_web", {"query": "{news}"}),
        ),
        ("urgent", True),
        ("to", "text"),
    ),
    Tool(
        "create_note",
        "Save a note for later.",
        {"text": "note"},
        _split("""note: {note}|take a note: {note}|make a note: {note}|write this down: {note}|jot this down: {note}
        |save a note saying {note}|new note: {note}|put this in my notes: {note}|remember this for me: {note}
        |keep this in mind: {note}|add a note: {note}|I want to remember this: {note}|for my notes: {note}
        |can you note down {note}?|write down {note}|note to self: {note}"""),
        _split("""record this: {note}|do not let me lose this: {note}|get this on paper: {note}|memo: {note}
        |scribble down {note}|keep a record of this: {note}|add this line to my notebook: {note}
        |store this thought: {note}"""),
        _split("""here is something to remember: {note}|I should not forget this: {note}|my notes should say {note}
        |type this into my notes: {note}|file this note: {note}|please hold on to this: {note}
        |list this for later: {note}|this belongs in a note: {note}|can you save {note} for me?"""),
        (
            ("send_message", {"to": "me", "text": "{note}"}),
            ("add_event", {"title": "{note}", "day": "today", "time": "9 am"}),
        ),
        ("color", "yellow"),
        ("text",),
    ),
    Tool(
        "get_weather",
        "Get the weather forecast of a city for a day.",
        {"city": "city", "day": "when"},
        _split("""what is the weather in {city} {when}?|weather in {city} {when}|will it rain in {city} {when}?
        |how is the weather in {city} {when}?|is it going to snow in {city} {when}?|forecast for {city} {when}
        |do I need an umbrella in {city} {when}?|how warm will it be in {city} {when}?|how cold is {city} {when}?
        |give me the forecast for {city} {when}|is it sunny in {city} {when}?|tell me the weather for {city} {when}
        |temperature in {city} {when}|look up the forecast for {city} {when}|will {city} be windy {when}?
        |what should I wear in {city} {when}, is it cold?"""),
        _split("""any chance of rain {when} in {city}?|should I pack a raincoat for {city} {when}?|{city} weather {when}
        |how hot does it get in {city} {when}?|what will the sky look like over {city} {when}?
        |is a storm coming to {city} {when}?|how many degrees in {city} {when}?|will it be wet in {city} {when}?"""),
        _split("""is it warm in {city} {when}?|do people need a coat in {city} {when}?|weather report for {city} {when}
        |will the sun shine in {city} {when}?|how bad is the weather in {city} {when}?|does it freeze in {city} {when}?
        |I am in {city} {when}, will it be cold?|what are the temperatures in {city} {when}?
        |can I go without a jacket in {city} {when}?"""),
        (
            ("search_web", {"query": "weather in {city}"}),
            ("find_route", {"to": "{city}", "mode": "car"}),
        ),
        ("unit", "celsius"),
        ("city", "city", "day"),
    ),
    Tool(
        "search_web",
        "Search the web.",
        {"query": "query"},
        _split("""search the web for {query}|search for {query}|google {query}|look up {query}|browse for {query}
        |find information about {query}|find out about {query}|what does the internet say about {query}?
        |look online for {query}|web search: {query}|I want to read about {query}|show me results for {query}
        |can you search for {query}?|dig up something on {query}|I am curious about {query}, look it up
        |search online: {query}"""),
        _split("""see what you can find on {query}|check the internet for {query}|do some research on {query}
        |get me links about {query}|any articles on {query}?|investigate {query} online|pull up pages about {query}
        |help me learn about {query} from the web"""),
        _split("""what can you tell me about {query}?|I need facts about {query}|open a web page about {query}
        |what is new with {query}?|teach me something about {query}|search results for {query}|read up on {query} for me
        |is there something online about {query}?|I wonder about {query}, search for it"""),
        (
            ("get_weather", {"city": "{query}", "day": "today"}),
            ("create_note", {"text": "{query}"}),
        ),
        ("limit", 10),
        ("query",),
    ),
    Tool(
        "play_music",
        "Play music by an artist.",
        {"artist": "artist"},
        _split("""play {artist}|play some {artist}|put on {artist}|play songs by {artist}|I want to hear {artist}
        |music by {artist}|start playing {artist}|let me listen to {artist}|can you play {artist}?|queue up {artist}
        |play the best of {artist}|I am in the mood for {artist}|turn on some {artist}|shuffle {artist}
        |play something by {artist}|how about some {artist}?"""),
        _split("""let us hear a track by {artist}|blast {artist}|I could use some {artist} right now
        |put a record by {artist} on|get {artist} going on the speakers|spin a few tunes by {artist}
        |I feel like dancing to {artist}|stream {artist}"""),
        _split("""start a song by {artist}|I would love to listen to {artist}|let {artist} sing for me
        |the next song should be by {artist}|a bit of {artist} would be nice|give me the hits of {artist}
        |I miss the sound of {artist}|put the new album of {artist} on|music please, {artist}"""),
        (
            ("set_light", {"room": "{artist}", "state": "on"}),
            ("search_web", {"query": "{artist}"}),
        ),
        ("volume", 5),
        ("artist",),
    ),
    Tool(
        "set_light",
        "Switch the light of a room on or off.",
        {"room": "room", "state": "state"},
        _split("""turn {state} the {room} light|turn the {room} lights {state}|switch {state} the light in the {room}
        |switch the {room} light {state}|{room} lights {state}|lights {state} in the {room}|put the {room} light {state}
        |can you turn {state} the lights in the {room}?|the lamp in the {room} should be {state}
        |I am going into the {room}, lights {state}|state=on>it is too dark in the {room}|state=on>light up the {room}
        |state=on>I cannot see anything in the {room}|state=off>make it dark in the {room}
        |state=off>nobody is in the {room}, kill the lights|state=off>the light still burns in the {room}, end that"""),
        _split("""flip the {room} light {state}|I need the {room} lamp {state}|state=on>give me some light in the {room}
        |state=on>brighten the {room}|state=off>no more light in the {room}|state=off>leave the {room} in the dark
        |set the lights of the {room} to {state}|{state} with the light in the {room}"""),
        _split("""{room} lamp {state}|can the {room} light go {state}?|get the lights in the {room} {state}
        |the {room} needs its light {state}|state=on>I want to see something in the {room}
        |state=on>I am reading in the {room}, I want light|state=off>the {room} should be dark
        |state=off>we went out of the {room}, end the light there|state=off>I go to sleep, lights out in the {room}"""),
        (
            ("play_music", {"artist": "{room}"}),
            ("set_timer", {"minutes": "10"}),
        ),
        ("color", "white"),
        ("state", "state", "room"),
    ),
    Tool(
        "find_route",
        "Find the way to a place.",
        {"to": "place", "mode": "mode"},
        _split("""how do I get to {place} by {mode}?|directions to {place} by {mode}|find a route to {place} by {mode}
        |take me to {place} by {mode}|show me the way to {place} by {mode}|{mode} route to {place}
        |I need to get to {place} by {mode}|guide me to {place} by {mode}|what is the best way to {place} by {mode}?
        |how long does it take to {place} by {mode}?|I want to go to {place} by {mode}|navigate to {place} by {mode}
        |plan a trip to {place} by {mode}|fastest way to {place} by {mode}|mode=car>how do I drive to {place}?
        |mode=bike>I want to bike to {place}"""),
        _split("""which way is {place} by {mode}?|get me to {place}, travelling by {mode}|can I reach {place} by {mode}?
        |map out the way to {place} by {mode}|I am lost, bring me to {place} by {mode}|is there a {mode} to {place}?
        |start navigation to {place} by {mode}|mode=car>I am driving to {place}, where do I turn?"""),
        _split("""which {mode} goes to {place}?|how far is {place} by {mode}?|what road goes to {place} by {mode}?
        |I have to be at {place} soon, going by {mode}|tell me how to get to {place} by {mode}
        |by {mode}, what is the way to {place}?|I do not know how to get to {place} by {mode}
        |mode=car>drive me to {place}|mode=bike>I will cycle to {place}, show me the way"""),
        (
            ("convert_units", {"value": "1", "from": "{mode}", "to": "{place}"}),
            ("get_weather", {"city": "{place}", "day": "today"}),
        ),
        ("avoid", "tolls"),
        ("to", "to", "mode"),
    ),
    Tool(
        "convert_units",
        "Convert an amount from one unit to another.",
        {"value": "value", "from": "source", "to": "target"},
        _split("""convert {value} {source} to {target}|how many {target} is {value} {source}?
        |{value} {source} in {target}|what is {value} {source} in {target}?|change {value} {source} into {target}
        |turn {value} {source} into {target}|{value} {source} to {target}|how much is {value} {source} in {target}?
        |give me {value} {source} as {target}|I have {value} {source}, what is that in {target}?
        |express {value} {source} in {target}|can you convert {value} {source} into {target}?
        |how many {target} are there in {value} {source}?|tell me {value} {source} in {target}
        |it says {value} {source}, I use {target}"""),
        _split("""{value} {source} equals how many {target}?|I only know {target}, so what is {value} {source}?
        |translate {value} {source} to {target}|write {value} {source} in terms of {target}
        |work out {value} {source} in {target}|if it is {value} {source}, how many {target} would that be?
        |switch {value} {source} over to {target}|make {value} {source} {target}"""),
        _split("""calculate {value} {source} in {target}|what would {value} {source} be in {target}?
        |my recipe says {value} {source}, how much in {target}?|show {value} {source} as {target}
        |I need {target}, not {source}: {value} {source}|how do you say {value} {source} in {target}?
        |is {value} {source} a lot in {target}?|count {value} {source} in {target}
        |{value} {source}, say it in {target}"""),
        (
            ("find_route", {"to": "{target}", "mode": "car"}),
            ("set_timer", {"minutes": "{value}"}),
        ),
        ("precision", 2),
        ("from", "from", "from", "value"),
    ),
)
