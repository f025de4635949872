"""The words of the embedded corpus: fields of law, sentence templates, and the frame of an act.

Data only; `embedded.py` makes a grammar of them. `{name}` in a template stands for a choice or for something said
earlier in the same act. Lists are in order of falling probability (weights close to 1 / rank); alternatives are parted
by " | ". Any change here changes the corpus: raise `embedded.VERSION` with it. All of it is invented: the acts, numbers
and concept identifiers name nothing real.
"""

from dataclasses import dataclass


def _split(alternatives: str) -> tuple[str, ...]:
    return tuple(alternatives.split(" | "))


@dataclass(frozen=True)
class Field:
    """A field of law.

    Attributes:
      name: as the title has it.
      treaty: articles of the Treaty an act may rest on.
      acts: earlier acts it may rest on.
      actions: what is done to the goods.
      goods: what it is about, plural.
      actors: who must obey.
      papers: documents required.
      aspects: properties of the goods.
      aims: purposes.
    """

    name: str
    treaty: tuple[str, ...]
    acts: tuple[str, ...]
    actions: tuple[str, ...]
    goods: tuple[str, ...]
    actors: tuple[str, ...]
    papers: tuple[str, ...]
    aspects: tuple[str, ...]
    aims: tuple[str, ...]


def _field(name: str, *lists: str) -> Field:
    return Field(name, *map(_split, lists))


FIELDS = (
    _field(
        "the common market in milk products",
        "43(2) | 207",
        "Regulation (EC) 1999/255 | Regulation (EC) 2001/214 | Directive (EC) 1996/116",
        "private storage | importation | marketing | public buying-in",
        "ripened cheeses | skimmed-milk powders | butter fats | whey preparations | fermented milks | caseins",
        "milk purchaser | dairy processor | storage contractor | approved trader",
        "storage contract | import licence | export certificate | quota statement",
        "fat content | storage temperature | protein content | bacterial count | net weight | ripening period",
        "stable incomes for producers | an orderly supply of the market | fair prices for consumers",
    ),
    _field(
        "the conservation of fishery resources",
        "43(3) | 43(2)",
        "Regulation (EC) 2002/371 | Regulation (EC) 2008/199 | Decision (EC) 2004/585",
        "landing | transhipment | first sale | weighing at sea",
        "demersal species | pelagic catches | deep-water sharks | juvenile fish | live shellfish | migratory stocks",
        "vessel master | fishing undertaking | auction centre | producer organisation",
        "fishing logbook | landing declaration | sales note | catch certificate",
        "catch weight | mesh size | fishing effort | minimum length | discard rate | area of capture",
        "the recovery of depleted stocks | a fair standard of living on the coast | selective fishing",
    ),
    _field(
        "the safety of civil aviation",
        "100(2) | 114",
        "Regulation (EC) 2008/216 | Regulation (EC) 2004/549 | Directive (EC) 2003/142",
        "maintenance | airworthiness approval | ground inspection | leasing",
        "turbine aeroplanes | rotorcraft | unmanned aircraft | flight recorders | landing gears | propellers",
        "air carrier | maintenance organisation | aerodrome manager | flight crew member",
        "operating certificate | technical log | release statement | occurrence report",
        "flight time | take-off mass | engine condition | runway distance | noise level | fuel reserve",
        "a high level of safety | the free movement of aircraft | the protection of passengers",
    ),
    _field(
        "medicinal products for human use",
        "114 | 168(4)",
        "Directive (EC) 2001/183 | Regulation (EC) 2004/726 | Directive (EC) 2003/194",
        "wholesale distribution | manufacture | clinical testing | labelling",
        "live vaccines | blood derivatives | generic medicines | herbal remedies | active substances | tracers",
        "authorisation holder | wholesale distributor | trial sponsor | qualified person",
        "marketing authorisation | batch record | safety report | package leaflet",
        "shelf life | dose strength | adverse effect | purity grade | trial outcome | excipient content",
        "the protection of public health | access to treatment for patients | innovation in the industry",
    ),
    _field(
        "the management of waste",
        "192(1) | 114",
        "Directive (EC) 2008/198 | Regulation (EC) 2006/413 | Directive (EC) 1999/131",
        "shipment | separate collection | recycling | final disposal",
        "waste oils | packaging materials | spent batteries | electronic scrap | sewage sludges | demolition residues",
        "waste holder | treatment facility | registered carrier | final recipient",
        "movement form | disposal permit | recovery declaration | waste register",
        "recovery rate | leachate quality | heavy-metal content | moisture level | gas emission | sorting yield",
        "a circular economy | a high level of environmental protection | the reduction of landfilling",
    ),
    _field(
        "the internal market in electricity",
        "194(2) | 114",
        "Directive (EC) 2003/154 | Regulation (EC) 2009/714 | Decision (EC) 2006/770",
        "cross-border trade | balancing | metering | network connection",
        "transmission capacities | reserve services | renewable sources | storage installations | interconnectors",
        "system operator | balancing party | electricity supplier | distribution undertaking",
        "grid agreement | capacity offer | guarantee of origin | outage plan",
        "peak load | line frequency | network tariff | congestion income | metering interval | ramping rate",
        "security of supply | effective competition | the choice of final customers",
    ),
    _field(
        "customs procedures",
        "33 | 207",
        "Regulation (EC) 2008/450 | Regulation (EC) 1998/292 | Decision (EC) 2008/170",
        "temporary admission | transit | inward processing | release for free circulation",
        "textile articles | precious metals | machine parts | tobacco goods | works of art | returned containers",
        "declarant | customs agent | warehouse keeper | guarantor",
        "transit declaration | proof of origin | guarantee certificate | entry summary",
        "customs value | tariff heading | preferential origin | duty rate | seal number | gross mass",
        "the financial interests of the Union | the speed of lawful trade | equal treatment of traders",
    ),
    _field(
        "the supervision of credit institutions",
        "53(1) | 127(6)",
        "Directive (EC) 2006/148 | Directive (EC) 2000/312 | Directive (EC) 2002/187",
        "valuation | securitisation | public disclosure | netting",
        "liquid assets | retail exposures | covered bonds | derivative positions | subordinated loans | own funds",
        "parent institution | statutory auditor | clearing member | risk officer",
        "recovery plan | capital statement | audit opinion | liquidity return",
        "leverage ratio | default probability | risk weight | market value | credit rating | maturity date",
        "the stability of the financial system | the protection of depositors | market confidence",
    ),
    _field(
        "animal health",
        "43(2) | 168(4)",
        "Directive (EC) 2003/185 | Directive (EC) 1997/178 | Regulation (EC) 2005/998",
        "intra-Union movement | vaccination | quarantine | slaughter",
        "bovine animals | poultry flocks | breeding pigs | hatching eggs | ornamental birds | registered horses",
        "livestock keeper | official veterinarian | assembly centre | animal transporter",
        "health certificate | animal passport | holding register | laboratory report",
        "vaccination status | herd size | ear-tag code | incubation time | body temperature | antibody count",
        "the eradication of disease | animal welfare | confidence in trade between regions",
    ),
    _field(
        "electronic communications networks",
        "114 | 62",
        "Directive (EC) 2002/121 | Regulation (EC) 2007/717 | Directive (EC) 2002/158",
        "interconnection | roaming | shared use | wholesale access",
        "radio frequencies | subscriber lines | mobile services | submarine cables | data centres | call numbers",
        "network provider | service reseller | tower company | licensed broadcaster",
        "frequency licence | reference offer | service contract | coverage map",
        "call charge | signal strength | data volume | connection speed | transit delay | numbering plan",
        "competition in infrastructure | universal access for citizens | an open internet",
    ),
)

# How the goods and their properties are spoken of, in every field.
PHRASES = {
    "aspect": _split("{property} | declared {property} | average {property} | highest {property} | actual {property}"),
    "wares": _split("{goods} | the {goods} concerned | certain {goods} | new {goods} | specified {goods}"),
}

# Words of every field. Each field begins these lists at another place, so that their order of frequency tells of it.
# A list may use those above it.
SHARED = {
    name: _split(alternatives)
    for name, alternatives in {
        "adj": "precise | regular | separate | complete | written | uniform | detailed | verifiable | timely | "
        "public | prior | comparable",
        "means": "sampling | documentary checks | inspection on the spot | remote reading | sworn statement | audit | "
        "comparison with earlier data | a recognised method | statistical estimate",
        "body": "the competent authority | the Commission | an approved laboratory | the regional office | "
        "a notified body | the supervisory board | an independent expert",
        "place": "the Union | a third country | a frontier region | an outermost region | a free zone | "
        "that territory | another Member State | the area concerned | a protected site",
        "period": "ten days | three months | one year | thirty days | six weeks | two years | five working days | "
        "four months | eight weeks | half a year | twenty days | one month",
        "event": "receipt of the application | the end of the calendar year | discovery of the irregularity | "
        "the date of issue | notification of the decision | completion of the checks | the first delivery | "
        "expiry of the {paper} | publication of the results",
        "fault": "cannot be verified | exceeds the limit set in the Annex | differs from that declared | "
        "has been altered | is disputed by {body} | was not recorded in time | falls short of the target | "
        "gives rise to doubt",
        "finding": "is not measured in the same way in all Member States | has given rise to disputes | "
        "differs from one region to another | no longer reflects scientific advice | remains a source of error",
        "use": "personal use | scientific research | exhibition | destruction | re-export | emergency relief | "
        "training | further processing | public procurement",
    }.items()
}

# In the order in which they may appear.
RECITALS = (
    "By {base}, {adj} rules were introduced on the {action} of {wares}",
    "Experience has shown that the {aspect} of {wares} {finding}",
    "Those who deal in {wares} have asked for {adj} information on the {aspect}",
    "In order to secure {aim}, the {aspect} of {wares} should be established by {means}",
    "It is appropriate to grant a period of {period} for the {action} of {wares} already in {place}",
    "Since {aim} cannot be achieved by the Member States alone, measures may be adopted at Union level",
    "The measures provided for in this {type} are in accordance with the opinion of the committee set up by {base}",
)

# Headings in the order in which they may appear; under each, how a sentence may begin and how it may go on.
ARTICLES: tuple[tuple[str, dict[str, tuple[str, ...]]], ...] = tuple(
    (heading, {beginning: _split(ends) for beginning, ends in sentences.items()})
    for heading, sentences in {
        "Scope": {
            "This {type} shall apply to ": "{wares} originating in {place} | every {actor} established in {place} | "
            "the {action} of {wares} in {place} | checks on the {aspect} by {means}",
            "The provisions of {base} shall ": "remain applicable to {wares} intended for {use} | "
            "not apply to the {action} of {wares} in {place} | govern the {aspect} until it is established by {means}",
        },
        "Obligations of the {actor}": {
            "Each {actor} shall ": "ensure that the {aspect} of {wares} is established by {means} | "
            "keep {adj} records of the {aspect} | inform {body} of any change in the {aspect} | "
            "carry the {paper} at all times in {place} | designate a person responsible for the {action} of {wares}",
            "No {actor} shall ": "offer {wares} for sale unless the {paper} is available to {body} | "
            "alter the {aspect} of {wares} | transfer the {paper} to another {actor} without the consent of {body}",
        },
        "Issue of the {paper}": {
            "The {paper} shall ": "state the {aspect} of {wares} | be issued by {body} | "
            "be valid for {period} from {event} | be kept for {period} by the {actor} | "
            "bear the stamp of {body} and the date of the {action}",
            "Applications for the {paper} shall ": "be lodged with {body} before the {action} of {wares} | "
            "include {adj} data on the {aspect} | be refused if the {actor} is established in {place}",
            "Member States shall ": "recognise any {paper} issued in {place} | draw up a {adj} model of the {paper}",
        },
        "Requirements for {goods}": {
            "The {aspect} of {wares} shall ": "be established by {means} | be indicated on the {paper} | "
            "not exceed the limit set in the Annex | be confirmed by {body} within {period} of {event}",
            "Member States shall ": "prohibit the {action} of {wares} originating in {place} | "
            "authorise the {action} of {wares} for {use} | make {adj} provision for {wares} intended for {use}",
            "Where {wares} are intended for {use}, the {actor} shall ": "inform {body} | "
            "obtain the {paper} within {period} of {event} | separate them from other consignments",
        },
        "Official controls": {
            "The competent authority shall ": "verify the {aspect} of {wares} by {means} | "
            "carry out {adj} checks on every {actor} | withdraw the {paper} for a period of {period} | "
            "suspend the {action} of {wares} in {place}",
            "Member States shall ": "check the {paper} by {means} | provide {body} with the staff needed for {means} | "
            "ensure that {adj} controls on the {action} of {wares} take place",
            "Each {actor} shall ": "grant {body} access to the {paper} | bear the costs of {means}",
        },
        "Exchange of information": {
            "Member States shall ": "send {body} a {adj} summary of the {aspect} of {wares} | "
            "exchange the data contained in the {paper} | notify each other of any {actor} established in {place}",
            "The Commission shall ": "publish {adj} statistics on the {action} of {wares} | "
            "forward the {paper} to {body} | set up a register of each {actor} within {period} of {event}",
        },
        "Penalties": {
            "Member States shall ": "lay down penalties for any {actor} who alters the {paper} | "
            "recover the sums due within {period} of {event} | withdraw {wares} from the market in {place}",
            "The {actor} shall ": "forfeit the security where the {aspect} {fault} | pay interest from {event} | "
            "lose the right to the {action} of {wares} for {period}",
        },
        "Review": {
            "The Commission shall ": "report on {aim} by 31 December {later} | examine whether the {aspect} {fault} | "
            "propose {adj} amendments to {base}",
            "Member States shall ": "assess the effect of this {type} on {aim} | consult {body} every {period}",
        },
    }.items()
)

FOLLOW_UPS = (
    "The Commission shall be informed within {period} of {event}.",
    "The {aspect} shall be entered in the {paper}.",
    "That period may be extended by {period} at the request of the {actor}.",
    "Member States may require {adj} evidence of {aim}.",
    "If the {aspect} {fault}, {wares} shall be held by {body}.",
)

KINDS = ("Regulation", "Directive", "Decision")
FORCE = {
    "Regulation": "This Regulation shall be binding in its entirety and directly applicable in all Member States.",
    "Directive": "This Directive is addressed to the Member States.",
    "Decision": "This Decision is addressed to the Member States and to the undertakings concerned.",
}
MONTHS = _split(
    "January | February | March | April | May | June | July | August | September | October | November | December"
)

# The frame of an act, in the order of the text.
TITLE = "{author} {type} (EU) {year}/{serial}\nof {date}\non "
PREAMBLE = """{field}, as regards the {action} of {goods}

THE {AUTHOR},
Having regard to the Treaty on the Functioning of the European Union, and in particular Article {treaty} thereof,
Having regard to {base}, and in particular Article {basis} thereof,
{proposal},
Whereas:
"""
ADOPTION = """{old} {reason} and {fate}.

HAS ADOPTED THIS {TYPE}:

Article 1
Subject matter
This {type} lays down {adj} rules for the {action} of {goods}{extent}

Article 2
Definitions
For the purposes of this {type}:
(a) '{actor}' means any person who {activity} {wares} in {place};
(b) '{paper}' means the document by which {body} {purpose} the {aspect};
(c) '{goods}' means all {goods} {reach}.

"""
CLOSING = """{repeal}
{old} is {repealed}.

Article {last}
Entry into force
This {type} shall enter into force on the {day} day following that of its publication in the Official Journal of the \
European Union{application}{force}

Done at {seat}, {date}.
For the {author}
{signature}

Concepts: {concepts}"""

# Alternatives that the frame alone uses.
FRAME = {
    name: _split(alternatives)
    for name, alternatives in {
        "reason": "no longer serves {aim} | has been overtaken by {base} | does not provide for {means}",
        "extent": ". |  in {place}. | , with a view to {aim}.",
        "activity": "supplies | holds | has control of | is responsible for the {action} of",
        "purpose": "confirms | records | certifies | makes known",
        "reach": "originating in {place} | the {aspect} of which is known | not intended for {use}",
        "day": "twentieth | third | seventh",
        "application": ".\n | . It shall apply from 1 January {next}.\n",
        "seat": "Brussels | Luxembourg | Strasbourg",
    }.items()
}
